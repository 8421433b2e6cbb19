"""What a loader needs besides ``keymgmt`` and ``keymgmt.errors``.

Whether there is memory for a model, asked before work starts; the C library, to keep memory from
swap and core dumps; wiping; the files that one device keeps for itself; which files are graphs, and
what an ONNX file keeps outside of itself.
"""

from keymgmt._crypto.dek import wipe
from keymgmt._system.free_memory import check_free_memory
from keymgmt._system.libc import libc
from keymgmt._verbs.device_file import DeviceFile
from keymgmt._verbs.onnx import CONVERT, External, move_external, outside_path
from keymgmt._verbs.source import GRAPHS

__all__ = [
    "CONVERT",
    "GRAPHS",
    "DeviceFile",
    "External",
    "check_free_memory",
    "libc",
    "move_external",
    "outside_path",
    "wipe",
]
