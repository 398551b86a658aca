"""The idea of the project: the chain of steps, what is expected, what is missing, what is run."""
