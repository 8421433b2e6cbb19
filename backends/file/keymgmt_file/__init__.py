"""Keys in private files of this machine: the backend ``file`` of keymgmt."""

from keymgmt_file._provider import FileProvider
from keymgmt_file._settings import FileSettings

__all__ = ["FileProvider", "FileSettings"]
