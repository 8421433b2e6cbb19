"""One call to the service, with login, expiry and translation around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from hvac import exceptions
from hvac.api.secrets_engines import Transit

from keymgmt.backend import ProviderUnavailable
from keymgmt_vault._auth import Login
from keymgmt_vault._cluster import ClusterAdapter
from keymgmt_vault._errors import denied, expired, translate

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Transit of one provider; thread-safe and fork-safe, and raises only keymgmt's errors."""

    def __init__(self, settings: VaultSettings) -> None:
        self.settings = settings
        self.adapter = ClusterAdapter(settings)
        self.login = Login(settings, self.adapter)
        self.transit = Transit(self.adapter)

    def call(self, verb: str, native: str, action: Callable[[], Any]) -> dict[str, Any]:
        """Run ``action`` logged in, once more if the token had died, and return its ``data``.

        Args:
            verb: what it does, as ``_errors.path_of`` names it.
            native: the key's name in Transit; empty for none.
            action: one request through ``adapter``.

        Raises:
            AccessDenied: expired or not allowed; the message says which.
            ProviderUnavailable: no answer that can be used.
            ProviderError: any other refusal, as ``_errors.translate``.
        """
        with self.adapter.operation():
            answer = self._with_login(verb, native, action)
        data = answer.get("data") if isinstance(answer, dict) else None
        return data if isinstance(data, dict) else {}

    def _with_login(self, verb: str, native: str, action: Callable[[], Any]) -> Any:
        self.login.ensure()
        token = self.adapter.token
        try:
            return action()
        except exceptions.Forbidden as error:
            if self.adapter.token == token:
                if not self.login.is_dead():
                    raise denied(verb, native, self.settings) from error
                if not self.login.again(token):
                    raise expired() from error
        except exceptions.VaultError as error:
            raise translate(error, verb, native, self.settings) from error
        try:
            return action()
        except exceptions.VaultError as error:
            if isinstance(error, exceptions.Forbidden) and self.login.is_dead():
                raise expired() from error
            raise translate(error, verb, native, self.settings) from error

    def close(self) -> None:
        """Close connections and forget the token."""
        self.adapter.close()


def text_of(data: Mapping[str, Any], name: str) -> str:
    """A string member of an answer; ProviderUnavailable if it is not there."""
    value = data.get(name)
    if not isinstance(value, str):
        raise ProviderUnavailable(f"the server's answer has no {name}")
    return value
