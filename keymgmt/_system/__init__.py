"""The operating system: files, locks, memory, time. Nothing here knows of keys."""
