"""keymgmt backend ``broker``: a key for this machine alone, against evidence of what runs on it."""
