"""all-MiniLM-L6-v2 with its own tokenizer, as a text embedding pipeline takes it.

``python embedder.py MINILM FOLDER``: from the folder of its weights and words, to a new one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
minilm, folder = map(Path, sys.argv[1:])
folder.mkdir()
graph = folder / "openvino_model.xml"
subprocess.run([sys.executable, HERE / "minilm_ir.py", minilm, graph, "hidden"], check=True)
shutil.copy(minilm / "config.json", folder)
shutil.copy(HERE / "models" / "minilm-tokenizer" / "openvino_tokenizer.xml", folder)
rest = (HERE / "models" / "minilm-tokenizer" / "openvino_tokenizer.bin.rest").read_bytes()
words = (minilm / "vocab.txt").read_bytes().rstrip(b"\n").split(b"\n")
# The vocabulary as the graph has it: where each word begins, where it ends, and the letters.
edges = np.array([0, *accumulate(map(len, words))], np.int32)
vocabulary = edges[:-1].tobytes() + edges[1:].tobytes() + b"".join(words)
(folder / "openvino_tokenizer.bin").write_bytes(rest[:345] + vocabulary + rest[345:])
