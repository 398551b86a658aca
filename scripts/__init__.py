"""The package behind tasks.py: one module per word of the flow (see README, "How it works")."""
