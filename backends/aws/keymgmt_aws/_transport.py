"""botocore's clients, cut off from the environment and files that botocore reads by itself.

Nothing here reads the environment, ``~/.aws``, ``/etc/boto.cfg`` or a proxy setting: a session gets
constants in place of every look-up, no handlers, plugins or data of others, and its own HTTP.
botocore is imported by the first call, and not before.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import ProviderUnavailable, check_trusted

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["SLOW", "Client", "http_session", "is_ours", "new_session", "prepare"]

SLOW: Final = 30.0
"""Seconds for a request that changes something, which is sent once: creating RSA keys is slow."""

_MAX_ANSWER: Final = 1 << 20
_SLOWLY: Final = ("CreateKey", "CreateAlias", "RotateKeyOnDemand")
is_ours: Final = threading.local()
"""``active`` while a thread is inside a call of keymgmt."""


class _Hidden(logging.Filter):
    """Drops botocore's log records of our calls below a warning: they show keys and tokens.

    A warning is logged without its exception, which may repeat an answer. The calls of other code
    in this process are logged as before.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(is_ours, "active", False):
            return True
        record.exc_info = record.exc_text = None
        return record.levelno >= logging.WARNING


_hidden: Final = _Hidden()


def _hide() -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("botocore", "urllib3"):
            # A logger keeps the same filter only once.
            logging.getLogger(name).addFilter(_hidden)


@functools.cache
def _loader() -> Any:
    """A loader of botocore's own service models, without ``~/.aws/models``; read once."""
    from botocore.loaders import Loader

    return Loader(extra_search_paths=[Loader.BUILTIN_DATA_PATH], include_default_search_paths=False)


@functools.cache
def prepare() -> None:
    """Import botocore and read its model of AWS KMS, once; this counts for no call's time limit."""
    import botocore.client
    import botocore.session  # noqa: F401

    # The loggers exist only after the import, and the first login would be logged.
    _hide()
    for part in ("service-2", "endpoint-rule-set-1"):
        _loader().load_service_model("kms", part)


def new_session(settings: AwsSettings, send: Callable[..., Any], **given: str) -> Any:
    """A botocore session without look-ups, whose clients use the endpoints of the settings.

    The clients send by ``send``; ``given`` are session variables, such as ``profile``.
    """
    from botocore.configprovider import ConfigValueStore, ConstantProvider
    from botocore.plugin import PluginContext, set_plugin_context
    from botocore.session import Session
    from botocore.tokens import TokenProviderChain

    set_plugin_context(PluginContext(plugins="DISABLED"))
    # botocore's own handlers add headers from the environment; AWS KMS needs none of them.
    session = Session(include_builtin_handlers=False, profile=given.get("profile"))
    values = {name: variable[2] for name, variable in session.SESSION_VARIABLES.items()}
    values |= {"config_file": os.devnull, "credentials_file": os.devnull, "s3": {}}
    values |= {"proxies_config": None, "ignore_configured_endpoint_urls": True, **given}
    constants = {name: ConstantProvider(value) for name, value in values.items()}
    session.register_component("config_store", ConfigValueStore(mapping=constants))
    session.register_component("data_loader", _loader())
    session.register_component("token_provider", TokenProviderChain(providers=[]))
    create = session.create_client
    session.create_client = lambda *service, **more: _create(
        create, settings, send, *service, **more
    )
    return session


def _create(
    make: Callable[..., Any],
    settings: AwsSettings,
    send: Callable[..., Any],
    service: str,
    *,
    config: Any = None,
    **given: Any,
) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    if settings.ca_file is not None:
        check_trusted(settings.ca_file, label="CA file", private=False, error=ProviderUnavailable)
    ours = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        user_agent="keymgmt-aws",
        proxies={},
        ignore_configured_endpoint_urls=True,
    )
    given["config"] = config.merge(ours) if config else ours
    given["endpoint_url"] = {"kms": settings.endpoint, "sts": settings.sts_endpoint}.get(service)
    client = make(service, verify=True, **given)
    client.meta.events.register("before-send", send)
    if config and config.signature_version is UNSIGNED:
        # botocore does this in a handler for some operations, and its handlers are not used here.
        client.meta.events.register("choose-signer", lambda **_: UNSIGNED)
    return client


def http_session(settings: AwsSettings, *, answer: float | None = None) -> Any:
    """HTTP without proxies, redirects, retries or endless answers; TLS 1.2, and names are checked.

    ``call_timeout`` limits a connection, and also an answer unless ``answer`` gives other seconds.
    """
    from botocore.httpsession import URLLib3Session

    class Http(URLLib3Session):  # type: ignore[misc]
        def _get_ssl_context(self) -> ssl.SSLContext:
            # botocore's own context would write session keys to the file of SSLKEYLOGFILE.
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        def send(self, request: Any) -> Any:
            request.stream_output = True
            answer = super().send(request)
            answer._content = answer.raw.read(_MAX_ANSWER + 1)
            if len(answer._content) > _MAX_ANSWER:
                answer.raw.close()
                raise ProviderUnavailable(f"an answer has more than {_MAX_ANSWER} bytes")
            return answer

    return Http(
        verify=str(settings.ca_file) if settings.ca_file else True,
        timeout=(settings.call_timeout, answer or settings.call_timeout),
        max_pool_connections=32,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    )


class Client:
    """A client of one service, ``kms`` or ``sts``; thread-safe, not to be used after a fork.

    A call raises botocore's errors. ``credentials`` are botocore's; without them (None) requests
    are not signed.
    """

    def __init__(self, service: str, settings: AwsSettings, credentials: Any) -> None:
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.credentials import CredentialResolver

        self.credentials = credentials
        self._http, self._slow = http_session(settings), http_session(settings, answer=SLOW)
        session = new_session(settings, self._send)
        resolver = CredentialResolver([])
        resolver.load_credentials = lambda: credentials
        session.register_component("credential_provider", resolver)
        config = Config(signature_version=UNSIGNED) if credentials is None else None
        region = settings.region
        self._client = session.create_client(service, region_name=region, config=config)
        _hide()

    def __call__(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Call an operation by its name in botocore; returns its answer."""
        answer: dict[str, Any] = getattr(self._client, operation)(**arguments)
        return answer

    def _send(self, request: Any, event_name: str, **_: Any) -> Any:
        slow = event_name.rpartition(".")[2] in _SLOWLY
        return (self._slow if slow else self._http).send(request)

    def close(self) -> None:
        """Close the connections that are idle; may be called again."""
        self._http.close()
        self._slow.close()
        self._client.close()
