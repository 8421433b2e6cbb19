"""Load the tokenizer of a sealed model into Hugging Face tokenizers, from memory.

::

    from keymgmt_tokenizers import load

    tokenizer = load("llm.sealed", name="llm")
    tokenizer.encode("hello").ids
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

import keymgmt
from keymgmt.errors import FormatError
from keymgmt.loading import choose_file, file_bytes
from keymgmt_tokenizers._merges import check_merges

if TYPE_CHECKING:
    from keymgmt import Config

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    file: str = "tokenizer.json",
) -> Tokenizer:
    """Open a sealed model, and build the tokenizer that one of its files describes.

    The text of the file is wiped. The tables that ``tokenizers`` builds from it are freed with the
    tokenizer, and not wiped.

    Args:
        path: the sealed model.
        name: the model that is expected; another one is refused.
        keys: a loaded config, or the path of one; else the one that ``keymgmt.load_config`` finds.
        file: the file of the tokenizer, as ``Tokenizer.save`` writes it.

    Raises:
        FormatError: there is no such file, it does not describe a tokenizer, or ``tokenizers``
            panics.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
        KeymgmtError: too little memory.
    """
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        title = sealed.manifest.name
        choose_file(sealed, file, (), label="tokenizer", hint="")
        with file_bytes(sealed, file) as (data, _):
            try:
                check_merges(data)
                return Tokenizer.from_buffer(data)
            except BaseException as error:
                # A panic of its native code is not an Exception, and its type cannot be imported.
                kind = type(error).__name__
                if not isinstance(error, (ValueError, RecursionError)) and kind != "PanicException":
                    raise
                # The error itself is not kept: it may quote the text of the file.
                message = f"tokenizers cannot read {file} of {title} ({kind})"
    raise FormatError(message, hint="seal a file that Tokenizer.save wrote")
