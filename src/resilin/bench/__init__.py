"""Benchmarks against peers: one shape of results, written by scripts, shown by commands."""
