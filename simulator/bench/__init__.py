"""Benchmarks: each a module with `measure`, run by name with `scripts/bench NAME --json`."""
