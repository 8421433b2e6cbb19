"""All that a backend imports from keymgmt. The contract in full: docs/writing-a-backend.md."""

from keymgmt._crypto.context_binding import inner_unwrap, inner_wrap
from keymgmt._crypto.dek import DEK_LENGTH, Dek, fill_random, wipe
from keymgmt._crypto.hpke import (
    HPKE_KINDS,
    hpke_generate,
    hpke_open,
    hpke_public,
    hpke_seal,
    hpke_split,
    open_with_ecdh,
)
from keymgmt._crypto.signatures import PublicKey
from keymgmt._providers.anchor import ANCHOR_FIRST, ANCHOR_START, SupportsAnchor, anchor_after
from keymgmt._providers.contract import (
    API_VERSION,
    KeyName,
    KeyProvider,
    Settings,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
)
from keymgmt._providers.data import (
    MAX_BLOB,
    Finding,
    Health,
    KeyInfo,
    KeyVersion,
    Signature,
    WrappedKey,
)
from keymgmt._providers.evidence import Evidence
from keymgmt._providers.faults import Fault, FaultTable
from keymgmt._providers.names import check_key, is_key, is_name, is_version
from keymgmt._providers.recipient_file import (
    RSA_OAEP_256,
    Recipient,
    find_signer,
    public_key_id,
    recipient_message,
    signatures_file,
    wrap_for,
)
from keymgmt._providers.registry import load_evidence
from keymgmt._providers.secret_source import ConfigPath, SecretSource, read_projected
from keymgmt._providers.versions import (
    check_kind,
    check_retirable,
    key_exists,
    no_version,
    not_held,
    version_retired,
)
from keymgmt._system.address import is_loopback, split_address
from keymgmt._system.audit import audit
from keymgmt._system.deadline import Deadline, within
from keymgmt._system.files import make_folder, replace_file, save_file, sync_directory, target_of
from keymgmt._system.fork import ForkSafe
from keymgmt._system.locks import lock_file
from keymgmt._system.strict_json import JsonReader, load_json
from keymgmt._system.trusted_file import check_trusted, read_file
from keymgmt.errors import (
    AccessDenied,
    ConfigError,
    FormatError,
    IntegrityError,
    KeymgmtError,
    KeyNotFound,
    KeyRetired,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
    bare,
)

__all__ = [
    "ANCHOR_FIRST",
    "ANCHOR_START",
    "API_VERSION",
    "DEK_LENGTH",
    "HPKE_KINDS",
    "MAX_BLOB",
    "RSA_OAEP_256",
    "AccessDenied",
    "ConfigError",
    "ConfigPath",
    "Deadline",
    "Dek",
    "Evidence",
    "Fault",
    "FaultTable",
    "Finding",
    "ForkSafe",
    "FormatError",
    "Health",
    "IntegrityError",
    "JsonReader",
    "KeyInfo",
    "KeyName",
    "KeyNotFound",
    "KeyProvider",
    "KeyRetired",
    "KeyVersion",
    "KeymgmtError",
    "LockedOut",
    "ProviderError",
    "ProviderUnavailable",
    "PublicKey",
    "Recipient",
    "SecretSource",
    "Settings",
    "Signature",
    "SupportsAnchor",
    "SupportsBatchUnwrap",
    "SupportsBatchWrap",
    "SupportsKeyDeletion",
    "SupportsKeyManagement",
    "SupportsOfflineRecipients",
    "SupportsSigning",
    "UnsupportedOperation",
    "UnwrapFailed",
    "WrappedKey",
    "WrongKey",
    "anchor_after",
    "audit",
    "bare",
    "check_key",
    "check_kind",
    "check_retirable",
    "check_trusted",
    "fill_random",
    "find_signer",
    "hpke_generate",
    "hpke_open",
    "hpke_public",
    "hpke_seal",
    "hpke_split",
    "inner_unwrap",
    "inner_wrap",
    "is_key",
    "is_loopback",
    "is_name",
    "is_version",
    "key_exists",
    "load_evidence",
    "load_json",
    "lock_file",
    "make_folder",
    "no_version",
    "not_held",
    "open_with_ecdh",
    "public_key_id",
    "read_file",
    "read_projected",
    "recipient_message",
    "replace_file",
    "save_file",
    "signatures_file",
    "split_address",
    "sync_directory",
    "target_of",
    "version_retired",
    "wipe",
    "within",
    "wrap_for",
]
