"""The controller's gRPC face: no decisions, only translation."""
