"""The README's pictures: terminals, drawn from real runs on real servers by `invoke pictures`."""
