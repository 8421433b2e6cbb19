"""``python -m keymgmt.cli``: the same as ``python -m keymgmt``."""

from keymgmt.cli import main

main()
