"""The central controller: the hierarchical loop, its store, its gateway and its command line."""
