"""Sealing: a plain model on disk becomes a sealed model, in constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from keymgmt._admit import step
from keymgmt._audit import audit
from keymgmt._config import check_model_name, use_config
from keymgmt._dek import Dek, wipe
from keymgmt._files import new_directory, replace_file
from keymgmt._inspect import Inspection, inspect
from keymgmt._recipients import resolve_groups
from keymgmt._sign import Signer
from keymgmt._source import find_source
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed.derive import commitment, file_key, payload_aad
from keymgmt.sealed.folder import KEYS, MANIFEST, SIGNATURES, SealedFolder, payload_name
from keymgmt.sealed.keys import UnlockPolicy, wrap_group
from keymgmt.sealed.manifest import DIGESTS, SEGMENT, FileEntry, Manifest, manifest_hash
from keymgmt.sealed.payload import seal_payload
from keymgmt.sealed.signatures import Signatures

if TYPE_CHECKING:
    from keymgmt._config import Config
    from keymgmt.sealed.keys import Wrap
    from keymgmt.sealed.manifest import Profile

__all__ = ["check_target", "exists", "seal", "write_sealed"]

Progress = Callable[[int, int], object]


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
    force: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Seal a model: encrypt its files, wrap the data key for its recipients, and sign it.

    Before the first byte is read every recipient wraps a throw-away key and the signer signs a
    probe, so that a denied key is not found after 40 GB. A failing or interrupted seal leaves
    ``target`` as it was.

    Args:
        source: an IR's ``.xml`` (with its ``.bin`` beside it), an ``.onnx``, or a folder.
        target: the folder to write, such as ``resnet50.sealed``; it does not exist yet.
        to: groups of recipients, any of which opens it: ``provider:key``, ``a:x+b:y`` for both
            together, ``@file`` for a recipient file. By default those of ``[seal] to``.
        sign: the publisher's key, ``provider:key``; by default that of ``[seal] sign``.
        keys: a loaded config, or the path of one.
        name: the model's name; by default made from the source's.
        release: its number, 0 to 2^53-1, which later releases raise.
        profile: ``default`` or ``fips``; by default that of ``[seal] profile``.
        metadata: short plain strings for people and tools.
        fingerprints: of recipient files that no trusted signer vouches for.
        force: exchange an existing ``target`` atomically.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: an argument, the config or the source is wrong, ``target`` exists, or
            somebody else changes the one to replace for a minute.
        UntrustedPublisher: nothing says that a recipient file is genuine.
        ProviderError: a recipient cannot be wrapped to, or the signer cannot sign.
        OSError: writing failed; nothing is left behind.
    """
    model, output = find_source(source), Path(target)
    if output.name in ("", ".."):
        output = Path(os.path.realpath(output))
    with use_config(keys) as config:
        check_target(output, force=force)
        groups = resolve_groups(list(to) or config.seal.to, config, fingerprints)
        key = sign if sign is not None else config.seal.sign
        signer = Signer(config, key) if key is not None else None
        try:
            with (
                _locked(output),
                new_directory(output, replace=force) as folder,
                Dek.generate() as dek,
            ):
                manifest = write_sealed(
                    folder,
                    {path: _FileContent(file) for path, file in model.files.items()},
                    dek,
                    groups,
                    signer,
                    template=Manifest(
                        id=os.urandom(16),
                        name=check_model_name(name if name is not None else model.name),
                        release=release,
                        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                        profile=_check_profile(profile or config.seal.profile),
                        segment_length=SEGMENT,
                        commitment=b"",
                        kind=model.kind,
                        main=model.main,
                        files=(),
                        metadata={**model.metadata, **(metadata or {})},
                    ),
                    progress=progress,
                )
                # Sealing takes a while, and somebody may have put something else there.
                check_target(output, force=force)
        except FileExistsError as error:
            raise exists(output, force=force) from error
        except FormatError as error:
            # Nothing was read from a sealed model here: what does not fit came as an argument.
            raise ConfigError(f"cannot seal this: {error}", hint=error.hint) from error
        audit("seal", model=manifest.id.hex(), name=manifest.name, release=manifest.release)
        return inspect(output)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let nobody rewrap, sign or reseal a model that is about to be replaced."""
    if not os.path.lexists(target):
        yield
        return
    with SealedFolder(target) as old:
        old.lock()
        yield


class Content(Protocol):
    """Plain bytes to seal: a file on disk, or a file of an open sealed model."""

    @property
    def size(self) -> int:
        """Its length in bytes."""
        ...

    def seal(self, target_fd: int, **parameters: Any) -> bytes:
        """Encrypt it with ``seal_payload``; the root of the digest tree."""
        ...


class _FileContent:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size

    def seal(self, target_fd: int, **parameters: Any) -> bytes:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot read {self._path}: {error.strerror}") from error
        try:
            return seal_payload(descriptor, self.size, target_fd, **parameters)
        finally:
            os.close(descriptor)


def write_sealed(
    folder: Path,
    contents: Mapping[str, Content],
    dek: Dek,
    groups: Sequence[Sequence[Wrap]],
    signer: Signer | None,
    *,
    template: Manifest,
    progress: Progress | None = None,
) -> Manifest:
    """Fill an empty folder with a sealed model; raises as ``seal`` does.

    ``template`` is the manifest without its files and commitment; the finished one is returned.
    """
    total = sum(content.size for content in contents.values())
    entries, done = [], 0
    # Checked while it costs nothing: a manifest that may not be written must not cost an hour.
    _complete(template, dek, [FileEntry(p, c.size, bytes(32)) for p, c in contents.items()])
    for path, content in contents.items():
        key = file_key(dek, template.id, path)
        output = folder / payload_name(path)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with output.open("xb", buffering=0) as file:
                root = content.seal(
                    file.fileno(),
                    key=key,
                    aad=payload_aad(template.id, path),
                    segment_length=template.segment_length,
                    digest=DIGESTS[template.profile],
                    progress=step(progress, done, total),
                )
        finally:
            wipe(key)
        entries.append(FileEntry(path, content.size, root))
        done += content.size
    manifest, data = _complete(template, dek, entries)
    digest = manifest_hash(data)
    policy = UnlockPolicy.make(
        dek, manifest.id, digest, [wrap_group(dek, digest, wraps) for wraps in groups]
    )
    signatures = Signatures()
    if signer is not None:
        signatures = signatures.with_signature(*signer.sign(data))
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


def _check_profile(text: str) -> Profile:
    for profile in DIGESTS:
        if profile == text:
            return profile
    raise ConfigError(f"no profile named {text!r}", hint=f"one of {', '.join(DIGESTS)}")


def check_target(target: Path, *, force: bool | None = None) -> None:
    """ConfigError unless a sealed model may be written at ``target``.

    ``force`` replaces one that is there; None where that is no choice.
    """
    if not target.parent.is_dir():
        raise ConfigError(f"the folder {target.parent} for {target.name} does not exist")
    if not os.path.lexists(target):
        return
    if not force:
        raise exists(target, force=force)
    # --force replaces a sealed model, and never somebody's home directory.
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise ConfigError(f"{target} exists and is no sealed model, so it is not replaced")


def exists(target: Path, *, force: bool | None = None) -> ConfigError:
    """What is said where ``check_target`` finds, or comes too late for, a ``target``."""
    choice = "" if force is None else ", or replace it with --force"
    return ConfigError(f"{target} exists", hint="name another folder" + choice)
