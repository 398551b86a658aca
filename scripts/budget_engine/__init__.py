"""Brings a PostgreSQL database to the Budget Engine & Telemetry schema, proves it, and says what is missing."""
