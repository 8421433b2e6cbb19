"""``python -m keymgmt``: the same as the script ``keymgmt``."""

from keymgmt.cli import main

main()
