"""Brings a PostgreSQL database to the Budget Engine & Telemetry schema, proves it, and says at any time what is missing."""
