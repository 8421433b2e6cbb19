"""No secret in what tools show that report an error with the variables of every frame."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from keymgmt_file import FileProvider
from rich.console import Console
from rich.traceback import Traceback

from keymgmt.errors import ProviderError

Open = Callable[..., FileProvider]


def report(error: BaseException) -> str:
    out, traceback = io.StringIO(), error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next  # the test itself knows the secret
    shown = Traceback.from_exception(
        type(error),
        error,
        traceback,
        show_locals=True,
        locals_max_length=None,
        locals_max_string=None,
    )
    Console(file=out, width=1000).print(shown)
    return out.getvalue()


def secret_of(path: Path) -> str:
    return str(json.loads((path / "models.jwks").read_text())["keys"][0]["k"])


@pytest.fixture
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_damaged_key_file(open_store: Open, path: Path) -> None:
    provider = open_store()
    provider.create_key("models", "aes256", {})
    secret = secret_of(path)
    data = json.loads((path / "models.jwks").read_text())
    data["keys"] *= 2
    (path / "models.jwks").write_text(json.dumps(data))
    with pytest.raises(ProviderError) as raised:
        provider.describe_key("models")
    assert secret not in report(raised.value)


def test_a_full_disk(open_store: Open, path: Path, request: pytest.FixtureRequest) -> None:
    provider = open_store("correct horse")
    open_store().create_key("models", "aes256", {})
    secret = secret_of(path)
    plain, locked = open_store(), provider
    request.getfixturevalue("full_disk")
    for change in (lambda: plain.rotate_key("models"), locked.lock):
        with pytest.raises(ProviderError) as raised:
            change()
        assert secret not in report(raised.value)


def test_a_full_disk_while_unlocking(
    open_store: Open, path: Path, request: pytest.FixtureRequest
) -> None:
    provider = open_store("correct horse")
    open_store().create_key("models", "aes256", {})
    secret = secret_of(path)
    provider.lock()
    request.getfixturevalue("full_disk")
    with pytest.raises(ProviderError) as raised:
        provider.unlock()
    assert secret not in report(raised.value)
    assert str(list(secret.encode()))[1:-1] not in report(raised.value)
