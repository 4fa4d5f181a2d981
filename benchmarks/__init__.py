"""Benchmarks of the path of the data, each against what it replaces, in turns in one run: ``make bench-data``."""
