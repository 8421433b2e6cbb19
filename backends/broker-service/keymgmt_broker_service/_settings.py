"""The config of the service, ``broker.toml``, and the files that it names."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, model_validator

import keymgmt
from keymgmt.backend import (
    ConfigError,
    ConfigPath,
    KeyName,
    KeyProvider,
    Settings,
    check_key,
    is_loopback,
    is_name,
    read_file,
)
from keymgmt_broker_service._nonces import NONCE_KEY_LENGTH
from keymgmt_broker_service._verify import AnyPolicy

__all__ = ["DEFAULT", "KeyEntry", "ServiceSettings", "load_service_settings", "read_nonce_key"]

DEFAULT: Final = Path("/etc/keymgmt/broker.toml")
_MAKE: Final = (
    "make it with: (umask 077; openssl rand -out nonce.key 32); it is the same at all instances"
)
_ABSENT: Final = "name the config of the broker: --config FILE"


class KeyEntry(Settings):
    """One key that the broker gives, as clients name it.

    Attributes:
        key: the key that unwraps, as ``provider:key`` of the config of keymgmt.
        allow: the policies that give it: a machine must satisfy one of them.
    """

    key: str
    allow: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_a_reference(self) -> KeyEntry:
        name, colon, key = self.key.partition(":")
        if not colon or not is_name(name):
            raise ValueError(f"{self.key[:80]!r} is not a key: write PROVIDER:KEY")
        try:
            check_key(key)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def find(self, config: keymgmt.Config) -> tuple[KeyProvider[Any], str]:
        """The provider and its name of the key; raises what ``Config.provider`` raises."""
        name, _, key = self.key.partition(":")
        return config.provider(name), key


class ServiceSettings(Settings):
    """``broker.toml``.

    Attributes:
        listen: address and port, such as ``"0.0.0.0:8443"``. Without TLS only on loopback.
        certificate: PEM of the certificate of the service, and its chain.
        private_key: PEM of the private key of the certificate, a private file.
        config: the config of keymgmt with the providers behind the broker.
        nonce_key: a private file of 32 random bytes, the same at all instances. Without it each
            start makes a new one, which does for one instance.
        collateral: the folder of Intel's collateral, for SGX and TDX.
        unsafe_root: a root certificate (DER) instead of Intel's, for tests: whoever has its key
            can make any evidence.
        workers: processes that answer; as many as this machine has processors, if not said.
        concurrent: requests that one worker verifies at the same time; more are told to come back.
        rate: requests a second that one address may make; an unwrap takes two.
        trusted_proxies: the addresses of balancers, whose word for the client's address counts.
        policies: name -> policy, each of one kind of evidence.
        keys: key -> what unwraps it, and which policies give it.
    """

    listen: str = "127.0.0.1:8443"
    certificate: ConfigPath | None = None
    private_key: ConfigPath | None = None
    config: ConfigPath
    nonce_key: ConfigPath | None = None
    collateral: ConfigPath | None = None
    unsafe_root: ConfigPath | None = None
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    concurrent: Annotated[int, Field(ge=1, le=1024)] = 32
    rate: Annotated[float, Field(gt=0, strict=False)] = 20.0
    trusted_proxies: list[str] = Field(default_factory=list)
    policies: dict[str, AnyPolicy]
    keys: dict[KeyName, KeyEntry]

    @model_validator(mode="after")
    def _fits_together(self) -> ServiceSettings:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together")
        if self.certificate is None and not is_loopback(self.address[0]):
            raise ValueError(
                f"listen = {self.listen!r} needs certificate and private_key: without TLS the "
                "broker listens on loopback alone"
            )
        if not self.keys:
            raise ValueError("keys names no key: there is nothing to give")
        for name, policy in self.policies.items():
            if policy.evidence != "tpm2" and self.collateral is None:
                raise ValueError(
                    f"policies.{name} is of {policy.evidence} and needs collateral: name the "
                    "folder of what Intel signed of its platforms"
                )
        behind: dict[str, str] = {}
        for key, entry in self.keys.items():
            if (other := behind.setdefault(entry.key, key)) != key:
                raise ValueError(
                    f"keys.{other} and keys.{key} are both {entry.key}, so that the weaker policy "
                    "would give either: name it once, or use two keys"
                )
            for name in entry.allow:
                if name not in self.policies:
                    raise ValueError(f"keys.{key} allows {name!r}, which is none of the policies")
        for proxy in self.trusted_proxies:
            ipaddress.ip_network(proxy)
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen at; ValueError where ``listen`` is neither."""
        host, _, port = self.listen.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"listen = {self.listen[:80]!r}: write ADDRESS:PORT")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"listen = {self.listen[:80]!r}: write an IP address") from None
        return host, int(port)

    @property
    def processes(self) -> int:
        """The number of workers."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def paths(self) -> set[Path]:
        """The files and folders that this config names, its policies' too."""
        return set(_paths_in(self))


def _paths_in(value: object) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
        return
    if isinstance(value, Settings):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    for each in value if isinstance(value, list | tuple) else ():
        yield from _paths_in(each)


def load_service_settings(path: Path) -> ServiceSettings:
    """Read the config of the service; ConfigError where it is missing, not trusted or wrong."""
    return keymgmt.load_settings(path, ServiceSettings, absent=_ABSENT)


def read_nonce_key(path: Path) -> bytes:
    """The key under which nonces are made; ConfigError where the file is not one."""
    try:
        key = bytes(read_file(path, label="nonce key", limit=4096, access="private"))
    except ConfigError as error:
        raise ConfigError(str(error), hint=error.hint or _MAKE) from error
    if len(key) != NONCE_KEY_LENGTH:
        raise ConfigError(
            f"the nonce key {path} has {len(key)} bytes, not {NONCE_KEY_LENGTH}",
            hint=_MAKE,
        )
    return key
