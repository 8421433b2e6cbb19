"""The HTTP interface of the service: three paths, with limits of size, time, number and rate."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import anyio.to_thread
from keymgmt_broker.protocol import (
    HEALTH,
    HEALTH_PATH,
    MAX_REQUEST,
    NONCE,
    NONCE_PATH,
    REFUSAL,
    STATUS,
    UNWRAP_PATH,
    encode_bytes,
)
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from keymgmt.backend import dump_json
from keymgmt_broker_service._decide import Broker, Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["BODY_SECONDS", "make_app"]

log = logging.getLogger("keymgmt.broker")
BODY_SECONDS: Final = 10.0
_SMALL: Final = 64 * 1024
_BODIES: Final = 64 * 1024 * 1024
_CLIENTS: Final = 65536
# Refusals before a body was read: who sends it slowly must not keep the connection.
_CLOSING: Final = frozenset({"size", "time", "rate", "busy"})


class _Rates:
    """The request rate of each address: a token bucket for each of the newest addresses."""

    def __init__(self, rate: float, processes: int) -> None:
        # Which worker a connection reaches is chance: each allows at once what all together do.
        self._rate, self._most = rate / processes, max(2.0, 2 * rate)
        self._buckets: OrderedDict[str, tuple[float, float, bool]] = OrderedDict()

    def count(self, client: str) -> None:
        """Count one more request of this client; Refusal where it exceeds the rate."""
        now = time.monotonic()
        tokens, since, refused = self._buckets.pop(client, (self._most, now, False))
        tokens = min(self._most, tokens + (now - since) * self._rate)
        self._buckets[client] = (tokens - (tokens >= 1), now, tokens < 1)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            if not refused:  # once until it is answered again, or it would fill the log
                log.warning("%s asks more often than rate allows", client)
            raise Refusal("rate")


class _Places:
    """A limit of simultaneous work in one event loop; Refusal where it is reached."""

    def __init__(self, most: int) -> None:
        self._free = most

    def __enter__(self) -> None:
        if not self._free:
            log.warning("a request is refused: there are too many at the same time")
            raise Refusal("busy")
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1


class _Room:
    """A bound of the bytes of all bodies that are being read; Refusal where it is full.

    A body that comes slowly holds what came of it, so that many of them keep nobody out.
    """

    def __init__(self, size: int) -> None:
        self._free = size

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[int], None]]:
        """A function that takes so many bytes more; all are given back at the end."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if size > self._free:
                log.warning("a request is refused: too many bodies are read at the same time")
                raise Refusal("busy")
            self._free -= size
            taken += size

        try:
            yield take
        finally:
            self._free += taken


def make_app(broker: Broker) -> ASGIApp:
    """The application of one worker."""
    settings = broker.settings
    rates = _Rates(settings.rate, settings.processes)
    deciding = _Places(settings.concurrent)
    # The evidence of a TPM contains its event log.
    large = any(policy.evidence == "tpm2" for policy in settings.policies.values())
    limit = MAX_REQUEST if large else _SMALL
    room = _Room(_BODIES)

    def limited(
        answer: Callable[[Request, str], Awaitable[bytes]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def run(request: Request) -> Response:
            client = _client(request)
            try:
                rates.count(client)
                return _json(await answer(request, client), 200)
            except Refusal as refusal:
                return _refusal(refusal.word)
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception:
                log.exception("a request of %s failed", client)
                return _refusal("fault")

        return run

    async def nonce(_request: Request, _client: str) -> bytes:
        return dump_json({"format": NONCE, "nonce": encode_bytes(broker.nonces.make())})

    async def unwrap(request: Request, client: str) -> bytes:
        with room.held() as take:
            body = await _body(request, limit, take)
        with deciding:
            return await anyio.to_thread.run_sync(broker.answer, body, client)

    async def health(_request: Request) -> Response:
        return _json(dump_json({"format": HEALTH}), 200)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = settings.concurrent
        yield
        broker.close()

    return Starlette(
        routes=[
            Route(NONCE_PATH, limited(nonce), methods=["POST"]),
            Route(UNWRAP_PATH, limited(unwrap), methods=["POST"]),
            Route(HEALTH_PATH, health, methods=["GET"]),
        ],
        lifespan=lifespan,
    )


async def _body(request: Request, limit: int, take: Callable[[int], None]) -> bytes:
    body = bytearray()
    try:
        if int(request.headers.get("content-length", "0")) > limit:
            raise Refusal("size")
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                take(len(chunk))
                body += chunk
                if len(body) > limit:
                    raise Refusal("size")
    except TimeoutError:
        raise Refusal("time") from None
    except ValueError:
        raise Refusal("request") from None
    return bytes(body)


def _client(request: Request) -> str:
    """The client's address; of IPv6 the network, since each host has a whole one."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    # A balancer may write an IPv4 address so; of all of them the network would be the same.
    address = getattr(address, "ipv4_mapped", None) or address
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), False))


def _refusal(word: str) -> Response:
    response = _json(dump_json({"format": REFUSAL, "refused": word}), STATUS[word])
    if word in _CLOSING:
        response.headers["Connection"] = "close"
    return response


def _json(content: bytes, status: int) -> Response:
    return Response(content, status, media_type="application/json")
