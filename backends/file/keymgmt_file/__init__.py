"""Keys in private files of this machine: the backend ``file`` of keymgmt."""

from keymgmt_file._provider import FileProvider, FileSettings

__all__ = ["FileProvider", "FileSettings"]
