"""Keys and what is computed with them. Nothing here knows of files or of a key service."""
