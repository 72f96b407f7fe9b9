"""Decisions made again from the inputs that the history kept."""
