"""Stands for your server: loads the model by its path, and knows nothing of keymgmt."""

import sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).rglob("*")):
    if file.is_file():
        print(file.name, len(file.read_bytes()), flush=True)
