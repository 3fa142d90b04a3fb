"""Benchmarks, each run by one command; they print a table and can write JSON."""
