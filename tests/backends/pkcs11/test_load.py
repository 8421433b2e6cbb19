"""Threads and forked processes that unwrap at once: no crash, no wrong key, no session left.

``KEYMGMT_LOAD=full`` runs 8 threads x 10 000 unwraps and 4 processes x 1 000; the default is a
tenth of it.
"""

from __future__ import annotations

import os
import threading
import traceback
from typing import Any

import pytest

from keymgmt.backend import Dek, KeyNotFound

pytestmark = pytest.mark.once

FULL = os.environ.get("KEYMGMT_LOAD") == "full"
THREADS, CALLS = 8, 10_000 if FULL else 500
PROCESSES, CHILD_CALLS = 4, 1_000 if FULL else 100


@pytest.fixture(params=["softhsm_token", "nss_token", "faulty"])
def token(request) -> Any:
    """The two modules, and SoftHSM behind the module that counts sessions."""
    return request.getfixturevalue(request.param)


def prepared(provider: Any) -> list[tuple[Dek, bytes, Any]]:
    try:
        provider.describe_key("load")
    except KeyNotFound:
        provider.create_key("load", "aes256", {})
    made = []
    for number in range(16):
        dek, context = Dek.generate(), b"context %d" % number
        made.append((dek, context, provider.wrap("load", dek, context)))
    return made


def unwrap_all(provider: Any, made: Any, count: int, offset: int = 0) -> str:
    for number in range(count):
        dek, context, wrapped = made[(number + offset) % len(made)]
        with provider.unwrap(wrapped, context) as got:
            if got != dek:
                return "a wrong key"
    return ""


@pytest.mark.timeout(1800)
def test_threads_and_forked_processes(token):
    provider = token.provider(timeout=60.0)
    made = prepared(provider)
    answers: list[str] = []

    def work(number: int) -> None:
        try:
            answers.append(unwrap_all(provider, made, CALLS, number))
        except Exception as error:  # noqa: BLE001 - the test says which
            answers.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    children = []
    for number in range(PROCESSES):
        # Forked in the middle of the threads' calls, with their sessions open.
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 2 if unwrap_all(provider, made, CHILD_CALLS, number) else 0
                provider.close()
            except BaseException:  # noqa: BLE001 - shown, as the child has nobody to tell
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    for thread in threads:
        thread.join()
    assert statuses == [0] * PROCESSES
    assert answers == [""] * THREADS
    opened, limit = provider.connection.sessions
    assert opened <= limit == 8
    provider.close()
    # Only what this test opened: other providers of the process hold theirs.
    with token.provider() as last:
        assert last.connection.run("counting", counted) in (None, 1)


def counted(session: Any) -> int | None:
    sessions: int | None = session.ck.token_info(session.token.slot).sessions
    return sessions
