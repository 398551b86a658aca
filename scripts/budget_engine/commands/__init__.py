"""The tasks: what a word on the command line does."""
