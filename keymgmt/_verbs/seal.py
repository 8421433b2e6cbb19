"""Seal: make a sealed model from a plain model on disk, in constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._config.config import use_config
from keymgmt._crypto.dek import Dek, wipe
from keymgmt._providers.names import check_model_name
from keymgmt._remote.location import need_folder
from keymgmt._system.audit import audit
from keymgmt._system.files import make_folder, new_directory, replace_file, to_system
from keymgmt._trust.candidate import Candidate, refusal, step
from keymgmt._trust.recipients import ProviderKey, resolve_groups
from keymgmt._verbs.inspect import Inspection, inspect
from keymgmt._verbs.sign import Signer, expiry_text
from keymgmt._verbs.source import find_source
from keymgmt.errors import ConfigError, FormatError, SealedModelError
from keymgmt.sealed.derive import commitment, file_key, payload_aad
from keymgmt.sealed.digests import digest_length
from keymgmt.sealed.folder import KEYS, MANIFEST, SIGNATURES, SealedFolder, payload_name
from keymgmt.sealed.keys import UnlockPolicy, wrap_group
from keymgmt.sealed.manifest import SEGMENT, FileEntry, Manifest, manifest_hash
from keymgmt.sealed.payload import seal_payload
from keymgmt.sealed.profiles import find_profile
from keymgmt.sealed.signatures import Signatures
from keymgmt.sealed.times import utc_text

if TYPE_CHECKING:
    from datetime import datetime

    from keymgmt._config.config import Config
    from keymgmt.sealed.keys import Wrap
    from keymgmt.sealed.payload import PayloadReader

__all__ = ["check_target", "exists", "replaceable", "seal", "write_sealed"]

log = logging.getLogger("keymgmt")

Progress = Callable[[int, int], object]
_SHOWN: Final = 8


def seal(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Sequence[str] = (),
    sign: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    name: str | None = None,
    release: int = 0,
    profile: str | None = None,
    metadata: Mapping[str, str] | None = None,
    fingerprints: Sequence[str] = (),
    expires: datetime | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Seal a model: encrypt its files, wrap the data key for its recipients, and sign it.

    Before the first byte is read every recipient wraps a throw-away key and the signer signs a
    probe, so that a denied key is not found after 40 GB. A failing or interrupted seal leaves
    ``target`` as it was.

    Args:
        source: an IR's ``.xml``, an ``.onnx`` or another graph that OpenVINO reads, with the
            files beside it that it needs; or a folder.
        target: the folder to write, such as ``resnet50.sealed``; it does not exist yet.
        to: groups of recipients, any of which opens it: ``provider:key``, ``a:x+b:y`` for both
            together, ``@file`` for a recipient file. By default those of ``[seal] to``.
        sign: the publisher's key, ``provider:key``; by default that of ``[seal] sign``.
        keys: a loaded config, or the path of one.
        name: the model's name; by default made from the source's.
        release: release number, 0 to 2^53-1; later releases have higher ones.
        profile: ``default``, ``fips`` or ``cnsa2``; by default that of ``[seal] profile``.
        metadata: short plain strings for people and tools.
        fingerprints: of recipient files that no trusted signer vouches for.
        expires: until when the signature counts, as for ``keymgmt.sign``.
        force: replace an existing sealed model at ``target`` atomically; its owner, group and
            mode stay.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: an argument, the config or the source is wrong, ``target`` exists, or holds
            what is not of a sealed model, or somebody else changes it for a minute.
        UntrustedPublisher: a recipient file is neither attested nor vouched for.
        ProviderError: a recipient cannot be wrapped to, or the signer cannot sign.
        OSError: writing failed; nothing is left behind.
    """
    until = expiry_text(expires)
    need_folder(target, new=True)
    model, output = find_source(source), Path(target)
    if output.name in ("", ".."):
        output = Path(os.path.realpath(output))
    with use_config(keys) as config:
        check_target(output, force=force)
        rules = find_profile(profile or config.seal.profile)
        groups = resolve_groups(list(to) or config.seal.to, config, fingerprints, rules)
        key = sign if sign is not None else config.seal.sign
        signer = Signer(config, key, rules) if key is not None else None
        if signer is None and until is not None:
            raise ConfigError(
                "until when it counts is said of a signature, and there is no key to sign with",
                hint="name one with --sign PROVIDER:KEY, or in [seal] sign",
            )
        try:
            with (
                _locked(output),
                new_directory(output, replaceable=replaceable(output) if force else None) as folder,
                Dek.generate() as dek,
            ):
                manifest = write_sealed(
                    folder,
                    {
                        path: Content(str(file.path), file.size, file.open)
                        for path, file in model.files.items()
                    },
                    dek,
                    groups,
                    signer,
                    template=Manifest(
                        id=os.urandom(16),
                        name=check_model_name(name if name is not None else model.name),
                        release=release,
                        created=utc_text(),
                        profile=rules.name,
                        segment_length=SEGMENT,
                        commitment=b"",
                        kind=model.kind,
                        main=model.main,
                        files=(),
                        metadata={**model.metadata, **(metadata or {})},
                    ),
                    expires=until,
                    progress=progress,
                )
        except FileExistsError as error:
            raise exists(output, force=force) from error
        except FormatError as error:
            # No sealed model was read here, so a format error is a wrong argument.
            raise ConfigError(f"cannot seal this: {error}", hint=error.hint) from error
        audit("seal", model=manifest.id.hex(), name=manifest.name, release=manifest.release)
        return dataclasses.replace(inspect(output), refusal=refusal(output, config))


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Lock a model that is about to be replaced against rewrap, sign and reseal."""
    if not os.path.lexists(target):
        yield
        return
    with SealedFolder(target) as old:
        old.lock()
        yield


@dataclass(frozen=True)
class Content:
    """A plain file to seal.

    Attributes:
        name: for messages: the path of a plain file, or its name in a sealed model.
        size: length in bytes.
        open: gives a descriptor of a plain file, or a reader of an open sealed model's.
    """

    name: str
    size: int
    open: Callable[[], AbstractContextManager[int | PayloadReader]]


def _warn_of_indistinct(groups: Sequence[Sequence[Wrap]], policy: UnlockPolicy) -> None:
    """Warn of recipients that only a trial tells apart: keys of one name in two key services."""
    holders: dict[tuple[str, ...], set[str]] = {}
    for wraps, group in zip(groups, policy.groups, strict=True):
        for wrap, wrapped in zip(wraps, group.recipients, strict=True):
            if isinstance(wrap, ProviderKey) and not wrapped.params:
                name = (wrapped.backend, wrapped.key, wrapped.version, wrapped.mechanism)
                holders.setdefault(name, set()).add(wrap.provider)
    for (backend, key, version, _), providers in holders.items():
        if len(providers) > 1:
            log.warning(
                "the keys %s of %s are one recipient by name (%s:%s@%s): whoever opens the model "
                "tries each of them; give the keys of different services different names",
                key,
                " and ".join(sorted(providers)),
                backend,
                key,
                version,
            )


def _new_file(path: Path) -> io.FileIO:
    # Private, whatever the umask: the folder is renamed with the modes that it has here.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return io.FileIO(os.open(path, flags, 0o644), "w")


def write_sealed(
    folder: Path,
    contents: Mapping[str, Content],
    dek: Dek,
    groups: Sequence[Sequence[Wrap]],
    signer: Signer | None,
    *,
    template: Manifest,
    expires: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Fill an empty folder with a sealed model; raises as ``seal`` does.

    ``template`` is the manifest without its files and commitment; the finished one is returned.
    ``expires`` is until when the signature counts.
    """
    total = sum(content.size for content in contents.values())
    entries, done = [], 0
    # Checked first: an invalid manifest must not be noticed after an hour of encryption.
    _complete(
        template,
        dek,
        [FileEntry(p, c.size, bytes(digest_length(template.digest))) for p, c in contents.items()],
    )
    for path, content in contents.items():
        key = file_key(dek, template.id, path)
        output = folder / to_system(payload_name(path))
        make_folder(output.parent)
        try:
            with _new_file(output) as file, content.open() as source:
                root = seal_payload(
                    source,
                    content.size,
                    file.fileno(),
                    key=key,
                    aad=payload_aad(template.id, path),
                    segment_length=template.segment_length,
                    digest=template.digest,
                    name=content.name,
                    progress=step(progress, done, total),
                )
        finally:
            wipe(key)
        entries.append(FileEntry(path, content.size, root))
        done += content.size
    manifest, data = _complete(template, dek, entries)
    digest = manifest_hash(data)
    policy = UnlockPolicy.make(
        dek, manifest, digest, [wrap_group(dek, digest, wraps) for wraps in groups]
    )
    _warn_of_indistinct(groups, policy)
    signatures = Signatures()
    if signer is not None:
        signatures = signatures.with_signature(*signer.sign(data))
        if expires is not None:
            signatures = signatures.with_expiry(*signer.sign_expiry(digest, expires), expires)
    for name, content_bytes in (
        (MANIFEST, data),
        (KEYS, policy.to_bytes()),
        (SIGNATURES, signatures.to_bytes()),
    ):
        replace_file(folder / name, content_bytes)
    return manifest


def _complete(template: Manifest, dek: Dek, entries: Sequence[FileEntry]) -> tuple[Manifest, bytes]:
    manifest = dataclasses.replace(
        template, commitment=commitment(dek, template.id), files=tuple(entries)
    )
    return manifest, manifest.to_bytes()


def check_target(target: Path, *, force: bool | None = None) -> None:
    """ConfigError unless a sealed model may be written at ``target``.

    ``force`` allows to replace an existing model; None for a caller without that option.
    """
    if not target.parent.is_dir():
        raise ConfigError(
            f"the folder {target.parent} for {target.name} does not exist",
            hint=f"make it with: mkdir -p {shlex.quote(str(target.parent))}",
        )
    if not os.path.lexists(target):
        return
    if not force:
        raise exists(target, force=force)
    replaceable(target)(target)


def replaceable(target: Path) -> Callable[[Path], None]:
    """A function that checks whether a folder may be deleted once ``target`` is replaced.

    Raises:
        ConfigError: the folder is not a whole sealed model, or has files that are not of one.
    """

    def look(folder: Path) -> None:
        if folder.is_symlink():
            raise ConfigError(f"{target} exists and is a link, so it is not replaced")
        try:
            with Candidate.read(folder) as old:
                old.policy()
                others = old.folder.others()
        except SealedModelError as error:
            raise ConfigError(
                f"{target} exists and is no sealed model, so it is not replaced: {error}",
                hint="name another folder",
            ) from error
        if others:
            names = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
            raise ConfigError(
                f"{target} holds what is not of the sealed model and would be deleted with it, so "
                f"it is not replaced: {names}",
                hint="move that away, or name another folder",
            )

    return look


def exists(target: Path, *, force: bool | None = None) -> ConfigError:
    """The error for a ``target`` that exists, or that appeared after ``check_target``."""
    choice = "" if force is None else ", or replace it with --force"
    return ConfigError(f"{target} exists", hint="name another folder" + choice)
