"""The revisions, in order: NNNN_what.py. A revision that has been released never changes."""
