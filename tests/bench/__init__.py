"""The benchmarks behind `invoke bench`: measured here, never asserted by a timed test."""
