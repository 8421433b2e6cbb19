"""The ``[providers.NAME]`` table of a broker: its addresses, and the evidence of this machine.

Addresses come from here and from nowhere else. TLS is required, except on loopback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from keymgmt.backend import (
    ConfigPath,
    Evidence,
    KeyName,
    Settings,
    is_name,
    load_evidence,
    split_address,
)

__all__ = ["Address", "BrokerSettings", "Proof"]

_FORM: Final = 'write the kind of evidence in quotes, or { kind = "KIND", ... }'
_HYBRID: Final = "hpke-mlkem768-x25519"


class Address(NamedTuple):
    """One address of the service."""

    secure: bool
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address; ValueError says what is wrong with it, ready to be shown."""
        parts = split_address(
            text, "an address holds no user name or password: evidence is the login"
        )
        if (
            parts.scheme not in ("https", "http")
            or not parts.hostname
            or not parts.hostname.isascii()
            or parts.path.strip("/")
            or parts.query
            or parts.fragment
        ):
            raise ValueError(f"{text[:200]!r} is not an address: write https://HOST:PORT")
        secure = parts.scheme == "https"
        return cls(secure, parts.hostname, parts.port or (443 if secure else 80))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}"


class Proof(Settings):
    """``{ kind = "KIND" }`` and the settings of that kind of evidence; ``"KIND"`` alone for none.

    Attributes:
        kind: the kind of evidence, as the entry point in ``keymgmt.evidence`` is called.
        settings: the other members of the table, as that kind has them.
    """

    kind: str
    settings: Settings

    @model_validator(mode="before")
    @classmethod
    def _checked_by_its_kind(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise ValueError(_FORM)  # noqa: TRY004 - pydantic takes no TypeError
        if not is_name(kind := value["kind"]):
            raise ValueError(f"{kind[:40]!r} is no kind of evidence; known are sgx, tdx and tpm2")
        table = {name: each for name, each in value.items() if name != "kind"}
        try:
            settings = load_evidence(kind).Settings.model_validate(table, context=info.context)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{place}: {message[:1].lower()}{message[1:]}") from None
        return {"kind": kind, "settings": settings}

    def make(self) -> Evidence[Any]:
        """The evidence; no I/O."""
        evidence: Evidence[Any] = load_evidence(self.kind)(self.settings)
        return evidence


class BrokerSettings(Settings):
    """Settings of the backend ``broker``.

    Attributes:
        service: the address of the service, or a list of the addresses of its instances.
        ca_file: PEM of the authorities that may vouch for the service; required with https.
        evidence: the kind of evidence, such as ``"sgx"``, or a table of the kind and its settings.
        recipients: key -> the recipient file to which new models are sealed, as
            ``keymgmt broker export`` wrote it.
        hpke: the kind of key that is made for each answer.
        timeout: seconds for a whole unwrap: making evidence, and all tries at all addresses.
    """

    service: str | list[str]
    ca_file: ConfigPath | None = None
    evidence: Proof
    recipients: dict[KeyName, ConfigPath] = Field(default_factory=dict)
    hpke: Literal["hpke-mlkem768-x25519", "hpke-mlkem1024", "hpke-p384"] = _HYBRID
    timeout: Annotated[float, Field(gt=0, le=600, strict=False)] = 30.0

    @model_validator(mode="after")
    def _fits_together(self) -> BrokerSettings:
        addresses = self.addresses
        if not 1 <= len(addresses) <= 16 or len(set(addresses)) != len(addresses):
            raise ValueError("service names 1 to 16 addresses, each once")
        if self.ca_file is None and any(address.secure for address in addresses):
            raise ValueError("https needs ca_file: name the authorities that vouch for the service")
        return self

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses in their order."""
        texts = [self.service] if isinstance(self.service, str) else self.service
        return tuple(Address.parse(text) for text in texts)
