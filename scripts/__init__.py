"""The package behind tasks.py: one module per word of the flow (see README, "How a step runs")."""
