"""A sealed model as files in memory, for programs that take paths."""
