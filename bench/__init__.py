"""Benchmarks: each starts its own stack, measures its yardstick in the same run and prints one JSON object."""
