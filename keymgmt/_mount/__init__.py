"""A sealed model by path, in memory: for programs that take paths."""
