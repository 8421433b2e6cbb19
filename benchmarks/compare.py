"""Two files that benchmarks wrote with ``--json``, one over the other.

    python benchmarks/compare.py OLD.json NEW.json

A benchmark compares with its own last file by itself; this is for files that were kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measure import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    print(compare(*(json.loads(path.read_text()) for path in (options.old, options.new))))


if __name__ == "__main__":
    main()
