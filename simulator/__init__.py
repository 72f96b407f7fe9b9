"""The digital twin: the same control code over a simulated fleet, and emulated host parts."""
