"""Verifying a sealed model: what is proved, and what is not, step by step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keymgmt._admit import Candidate, step
from keymgmt._config import use_config
from keymgmt._files import new_directory
from keymgmt._open import open_model
from keymgmt._provider import Finding
from keymgmt.errors import ConfigError, UntrustedPublisher

if TYPE_CHECKING:
    from keymgmt._config import Config
    from keymgmt._open import SealedModel
    from keymgmt.sealed.manifest import Manifest

__all__ = ["Verification", "unseal", "verify"]

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Verification:
    """What ``verify`` proved: each finding is ``ok``, or ``skipped`` with the reason.

    Whatever failed was raised instead.
    """

    manifest: Manifest
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.manifest.name,
            "release": self.manifest.release,
            "id": self.manifest.id.hex(),
            "findings": [
                {"name": one.name, "status": one.status, "detail": one.detail}
                for one in self.findings
            ],
        }


def verify(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    signature_only: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Prove all that can be proved of a sealed model, down to every segment.

    Args:
        path: the sealed model's folder.
        name: the model name that is expected.
        keys: a loaded config, or the path of one.
        signature_only: check signature and digests and ask no key service; a signature must be
            there and be trusted, whatever ``require_signature`` says.
        progress: called with (bytes done, bytes in all).

    Raises:
        KeymgmtError: what did not hold, as ``keymgmt.open`` raises it.
    """
    with use_config(keys) as config:
        if signature_only:
            return _verify_signature(path, name, config, progress)
        with open_model(path, name=name, keys=config) as model:
            _verify_payload(model, progress)
            return Verification(model.manifest, _findings(model))


def _verify_signature(
    path: str | os.PathLike[str], name: str | None, config: Config, progress: Progress | None
) -> Verification:
    if not config.policy.require_signature:
        raise UntrustedPublisher(
            "this config trusts no publisher, so a signature proves nothing here",
            hint="name one in [policy] publishers",
        )
    with Candidate.read(path) as candidate:
        publisher = candidate.trust(config, name)
        candidate.policy()
        candidate.check_digests(progress)
        signer = publisher.file.name if publisher else ""
        return Verification(
            candidate.manifest,
            (
                Finding("signature", "ok", f"by {signer}, trusted for {candidate.manifest.name}"),
                Finding("digests", "ok", f"{len(candidate.manifest.files)} files as published"),
                Finding("data key", "skipped", "no key service was asked"),
                Finding("segments", "skipped", "nothing was decrypted"),
            ),
        )


def _verify_payload(model: SealedModel, progress: Progress | None) -> None:
    done, total = 0, model.manifest.size
    for entry in model.manifest.files:
        model.verify(entry.path, step(progress, done, total))
        done += entry.size


def _findings(model: SealedModel) -> tuple[Finding, ...]:
    manifest = model.manifest
    files = f"{len(manifest.files)} files"
    signed = model.publisher is not None
    return (
        Finding("signature", "ok", f"by {model.publisher}, trusted for {manifest.name}")
        if signed
        else Finding("signature", "skipped", "this config requires none"),
        Finding("digests", "ok", f"{files} as published")
        if signed
        else Finding("digests", "skipped", "without a signature they prove nothing"),
        Finding("data key", "ok", f"{_opened_by(model)}; commitment and MAC hold"),
        Finding("segments", "ok", f"{files}, {manifest.size} bytes decrypted and authenticated"),
    )


def _opened_by(model: SealedModel) -> str:
    return "cached" if model.group is None else f"opened by group {model.group + 1}"


def unseal(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the plain files of a sealed model to a new folder (0700, files 0600).

    This is the one verb that puts plaintext on a disk. The folder appears when all of it was
    verified, or not at all.

    Raises:
        ConfigError: ``directory`` exists, or cannot be written.
        KeymgmtError: as ``keymgmt.open``.
    """
    target = Path(directory)
    with open_model(path, name=name, keys=keys) as model:
        done, total = 0, model.manifest.size
        try:
            with new_directory(target, mode=0o700) as folder:
                for entry in model.manifest.files:
                    file = folder / entry.path
                    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _write_plain(model, entry.path, file, step(progress, done, total))
                    done += entry.size
        except FileExistsError as error:
            raise ConfigError(f"{target} exists", hint="name another folder") from error
        except FileNotFoundError as error:
            raise ConfigError(f"the folder {target.parent} does not exist") from error
        except OSError as error:
            raise ConfigError(f"cannot write {target}: {error.strerror}") from error
        return model.manifest


def _write_plain(
    model: SealedModel, path: str, file: Path, progress: Callable[[int], object] | None
) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    done = 0
    with open(descriptor, "wb", buffering=0) as output, contextlib.ExitStack() as stack:  # noqa: PTH123 - a descriptor
        buffer = memoryview(bytearray(model.manifest.segment_length))
        with model.naming(path):
            content = stack.enter_context(model.open(path))
        while True:
            # What goes wrong with writing is not said of the model.
            with model.naming(path):
                count = content.readinto(buffer)
            if not count:
                break
            written = 0
            while written < count:
                written += output.write(buffer[written:count])
            done += count
            if progress is not None:
                progress(done)
