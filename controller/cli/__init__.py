"""Command lines: the two daemons of the control plane and the operator's `dynamollm`."""
