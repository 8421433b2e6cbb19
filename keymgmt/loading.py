"""The functions that a loader needs besides ``keymgmt`` and ``keymgmt.errors``.

They check that there is memory for a model before work starts; give memory for plaintext that is
left out of core dumps, kept from swap and wiped; decrypt files of an open model into such memory;
keep encrypted files that only this device can read; say which files are graphs; and find the data
that an ONNX file keeps in other files. The C library is here too.
"""

from keymgmt._crypto.dek import wipe
from keymgmt._crypto.memory import PrivateMemory, guard, joined_bytes, private_bytes, unguard
from keymgmt._system.free_memory import check_free_memory
from keymgmt._system.libc import libc
from keymgmt._verbs.device_file import DeviceFile
from keymgmt._verbs.in_memory import choose_file, file_bytes, file_memory, outside_part
from keymgmt._verbs.onnx import CONVERT, External, move_external, outside_path
from keymgmt._verbs.source import GRAPHS

__all__ = [
    "CONVERT",
    "GRAPHS",
    "DeviceFile",
    "External",
    "PrivateMemory",
    "check_free_memory",
    "choose_file",
    "file_bytes",
    "file_memory",
    "guard",
    "joined_bytes",
    "libc",
    "move_external",
    "outside_part",
    "outside_path",
    "private_bytes",
    "unguard",
    "wipe",
]
