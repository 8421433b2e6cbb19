"""The operator's words: keymgmt.toml, read, checked and explained."""
