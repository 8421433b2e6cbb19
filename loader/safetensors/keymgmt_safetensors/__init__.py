"""Load the tensors of a sealed model: views of one buffer, wiped when the last of them is gone.

::

    from keymgmt_safetensors import load

    tensors = load("llm.sealed", name="llm")                      # numpy
    tensors = load("llm.sealed", name="llm", framework="pt")      # torch, where it is installed
"""

from keymgmt_safetensors._load import load

__all__ = ["load"]
