"""The daemon on each GPU host."""
