"""The README's picture: a terminal, drawn from a real run on a real server by `invoke pictures`."""
