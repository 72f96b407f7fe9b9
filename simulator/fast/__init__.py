"""The fast twin: the reference's continuous batching over arrays, compiled, for weeks of load in minutes."""
