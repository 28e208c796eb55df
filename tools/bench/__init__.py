"""Benchmarks: the matrix on a mounted volume, and one program per layer below it."""
