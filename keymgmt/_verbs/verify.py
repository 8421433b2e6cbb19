"""Verify a sealed model, and list step by step what is proved and what is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keymgmt._config.config import use_config
from keymgmt._providers.data import Finding
from keymgmt._system.words import counted
from keymgmt._trust.candidate import Candidate, step
from keymgmt._verbs.open import open_model
from keymgmt.errors import UntrustedPublisher

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._trust.policy import Vouched
    from keymgmt._verbs.open import SealedModel
    from keymgmt.errors import Attempt
    from keymgmt.sealed.manifest import Manifest

__all__ = ["Verification", "verify"]

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Verification:
    """The result of ``verify``: each finding is ``ok``, ``skipped`` or a ``warning``.

    A failed step is not listed: it was raised as an error.

    Attributes:
        manifest: name, release, files and metadata.
        findings: step by step.
        opened_by: names of the providers that opened it.
        failed: the providers of earlier groups that failed, each with its reason.
    """

    manifest: Manifest
    findings: tuple[Finding, ...]
    opened_by: tuple[str, ...] = ()
    failed: tuple[Attempt, ...] = ()

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
            "opened_by": list(self.opened_by),
            "failed": [attempt.to_json() for attempt in self.failed],
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
        path: the sealed model's folder, or its location (``https://HOST/PATH``).
        name: the model name that is expected.
        keys: a loaded config, or the path of one.
        signature_only: check signature and digests without any key service, so without the anchor
            of ``remember_releases``; a trusted signature is required, whatever
            ``require_signature`` says.
        progress: called with (bytes done, bytes in all).

    Raises:
        KeymgmtError: what did not hold, as ``keymgmt.open`` raises it.
    """
    with use_config(keys) as config:
        if signature_only:
            return _verify_signature(path, name, config, progress)
        with open_model(path, name=name, keys=config) as model:
            _verify_payload(model, progress)
            return Verification(model.manifest, _findings(model), model.opened_by, model.failed)


def _verify_signature(
    path: str | os.PathLike[str], name: str | None, config: Config, progress: Progress | None
) -> Verification:
    if not config.policy.require_signature:
        raise UntrustedPublisher(
            "this config trusts no publisher, so a signature proves nothing here",
            hint="name one in [policy] publishers",
        )
    with Candidate.read(path, config.remote) as candidate:
        trust = candidate.trust(config, name, ask=False)
        candidate.policy()
        candidate.check_digests(progress)
        return Verification(
            candidate.manifest,
            (
                _signature(trust.vouched, candidate.manifest),
                *(
                    [Finding("release", "skipped", "the anchor of what is remembered: not asked")]
                    if trust.memory and trust.known is None
                    else []
                ),
                Finding(
                    "digests",
                    "ok",
                    f"{counted(len(candidate.manifest.files), 'file')} as published",
                ),
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
    files = counted(len(manifest.files), "file")
    signed = model.publisher is not None
    return (
        _signature(model.vouched, manifest),
        Finding("digests", "ok", f"{files} as published")
        if signed
        else Finding("digests", "skipped", "without a signature they prove nothing"),
        Finding("data key", "ok", f"{_opened_by(model)}; commitment and MAC hold"),
        *(
            Finding(f"provider {attempt.provider}", "warning", str(attempt.error))
            for attempt in model.failed
        ),
        Finding("segments", "ok", f"{files}, {manifest.size} bytes decrypted and authenticated"),
    )


def _signature(vouched: Vouched | None, manifest: Manifest) -> Finding:
    if vouched is None:
        return Finding("signature", "skipped", "this config requires none")
    until = f", until {vouched.expires}" if vouched.expires else ""
    return Finding("signature", "ok", f"by {vouched.name}, trusted for {manifest.name}{until}")


def _opened_by(model: SealedModel) -> str:
    if model.group is None:
        return "cached"
    return f"opened by group {model.group + 1} ({'+'.join(model.opened_by)})"
