"""keymgmt.toml: where it is found, what is refused, and how exactly that is said."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keymgmt import Config, load_config, load_settings
from keymgmt._config.config import CacheSettings, Policy, SealDefaults
from keymgmt._providers.registry import backends, load_backend
from keymgmt.backend import ConfigPath, Settings
from keymgmt.errors import BackendNotInstalled, ConfigError, KeymgmtError

Install = Callable[..., Path]

ACME = """
from keymgmt.backend import ConfigPath, KeyName, Health, KeyProvider, SecretSource, Settings

class Auth(Settings):
    method: str = "pin"
    pin: SecretSource | None = None

class AcmeSettings(Settings):
    address: str
    ca_file: ConfigPath | None = None
    auth: Auth = Auth()
    pins: dict[KeyName, SecretSource] = {}

class Acme(KeyProvider[AcmeSettings]):
    backend = "acme"
    Settings = AcmeSettings
    closed = 0
    def wrap(self, key, dek, context): raise NotImplementedError
    def unwrap(self, wrapped, context): raise NotImplementedError
    def check(self, key=None): return Health(())
    def close(self): self.closed += 1
"""


@pytest.fixture(autouse=True)
def _acme(install) -> None:
    load_backend.cache_clear()
    install("acme-hsm", "keymgmt.backends", {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)


@pytest.fixture
def write(tmp_path) -> Callable[[str], Path]:
    def to(text: str) -> Path:
        path = tmp_path / "keymgmt.toml"
        path.write_text(text)
        return path

    return to


GOOD = '[providers.hsm]\nbackend = "acme"\naddress = "a"\n'


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("providers = 3", "providers: ", None),
        ("[provider.hsm]", "provider: unknown key", "did you mean 'providers'?"),
        ("[policy]\npublisher = {}", "[policy] publisher: unknown", "did you mean 'publishers'?"),
        ("[policy]\nrequire_signature = 1", "[policy] require_signature: ", None),
        ("[policy.minimum_release]\nm = -1", "[policy.minimum_release] m: ", None),
        ("[policy]\nprefer = ['hms']\n" + GOOD, "no provider named 'hms'", "did you mean 'hsm'?"),
        (
            "[policy]\nrequire_signature = false\nminimum_release = { m = 1 }",
            "minimum_release and remember_releases need signatures",
            None,
        ),
        (
            "[policy]\nrequire_signature = false\npublishers = { 'a.pem' = ['*'] }",
            "publishers are named",
            None,
        ),
        ("[providers.hsm]\naddress = 'a'", "[providers.hsm] has no backend", "backend ="),
        ("[providers.'../x']\nbackend = 'acme'", "is not a provider name", "lower-case"),
        ("[providers.hsm]\nbackend = 'acme'\ndistribution = ['a']", "distribution", None),
    ],
)
def test_a_wrong_config_names_file_table_and_key(write, text, said, hint):
    path = write(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)
    assert hint is None or hint in str(raised.value.hint)


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        ("adress = 'b'", "[providers.hsm] adress: unknown key", "did you mean 'address'?"),
        ("ca_file = 3", "[providers.hsm] ca_file: ", None),
        ("auth = { methd = 'x' }", "[providers.hsm.auth] methd: unknown", "did you mean 'method'?"),
        ("auth = { pin = 'hunter2' }", "a secret is not written here", None),
        ("auth = { pin = { env = 'A', file = 'B' } }", "exactly one of", None),
        ("auth = { pin = {} }", "exactly one of", None),
        (
            "pins = { '../x' = { env = 'A' } }",
            "[providers.hsm.pins] ../x: '../x' is not a key name",
            None,
        ),
        ("auth = { pin = { credential = '../x' } }", "without slashes", None),
    ],
)
def test_wrong_settings_of_a_backend_are_named_too_and_secrets_are_not_repeated(
    write, line, said, hint
):
    with load_config(write(GOOD + line)) as config, pytest.raises(ConfigError) as raised:
        config.provider("hsm")
    assert said in str(raised.value)
    assert hint is None or hint in str(raised.value.hint)
    assert "hunter2" not in f"{raised.value} {raised.value.hint} {raised.value.__context__!r}"


WRONG = (3, -1, 1.5, "", "x", True, [], {}, [3], {"a": 3}, {"a": [3]}, {"a": -1}, {"a": {"b": 3}})


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_no_sentence_is_in_the_words_of_pydantic(wrong):
    """For every setting of ours, and of every backend that is installed here."""
    said = []
    tables = {"policy": Policy, "seal": SealDefaults, "cache": CacheSettings}
    for table, settings in tables.items():
        for name in settings.model_fields:
            said.append({table: {name: wrong}})
    for backend in backends():
        known = load_backend(backend).Settings.model_fields
        said += [{"providers": {"p": {"backend": backend, name: wrong}}} for name in known]
    said += [{name: wrong} for name in ("providers", *tables)] + [{"providers": {"p": wrong}}]
    for data in said:
        try:
            Config(data).provider("p")
        except KeymgmtError as error:
            words = str(error).lower()
            assert not re.search("input should|field required|valid |pydantic|instance of", words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("providers = 3", "providers: not a table: write { NAME = VALUE }"),
        ("seal = { to = 3 }", "[seal] to: not a list: write [VALUE, VALUE]"),
        ("seal = { sign = 3 }", "[seal] sign: not a text: write it in quotes"),
        (
            "policy = { remember_releases = 3 }",
            "remember_releases: write a path in quotes, or a table of file and anchor",
        ),
        (
            "policy = { require_signature = 1 }",
            "[policy] require_signature: neither true nor false",
        ),
        ("policy = { fallback = 'x' }", "[policy] fallback: not 'use' or 'refuse'"),
        ("policy = { minimum_release = { a = 1.5 } }", "release] a: not a whole number"),
        ("policy = { minimum_release = { a = -1 } }", "release] a: below 0"),
        ("policy = { signatures = { a = 17 } }", "[policy.signatures] a: above 16"),
        ("cache = { uses = 1 }", "[cache] seconds: it is missing"),
        ("cache = { seconds = 'x', uses = 1 }", "[cache] seconds: not a number"),
    ],
)
def test_a_wrong_value_is_said_in_the_words_of_toml(write, text, said):
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert str(caught.value).endswith(said)


def test_a_misspelt_key_is_said_rather_than_that_the_right_one_is_missing(write):
    config = load_config(write('[providers.hsm]\nbackend = "acme"\nadress = "a"\n'))
    with pytest.raises(ConfigError, match="adress: unknown key"):
        config.provider("hsm")


def test_relative_paths_are_relative_to_the_file_and_home_is_expanded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir("/")
    for given, meant in (
        ("ca.pem", tmp_path / "ca.pem"),
        ("/etc/ca.pem", Path("/etc/ca.pem")),
        ("~/ca.pem", Path("/home/somebody/ca.pem")),
    ):
        with load_config(write(GOOD + f"ca_file = '{given}'")) as config:
            assert config.provider("hsm").settings.ca_file == meant


def test_a_config_that_others_can_write_is_refused(write):
    path = write(GOOD)
    for mode in (0o606, 0o602, 0o622):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="others can write it") as raised:
            load_config(path)
        assert raised.value.hint == f"chmod go-w {path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_config_of_somebody_else_is_refused(write):
    path = write(GOOD)
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        load_config(path)


def test_what_is_no_small_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "large.toml").write_bytes(b"#" * ((1 << 20) + 1))
    for name, said in (
        ("fifo", "not a regular file"),
        ("large.toml", "larger"),
        (".", "not a regular file"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read") as raised:
        load_config(tmp_path / "missing.toml")
    assert "keymgmt init" in str(raised.value.hint)


@pytest.mark.parametrize("content", [b"\xff", b"a = ", b"[" * 100_000, b"a = 1\na = 2"])
def test_what_is_not_toml_is_said(tmp_path, content):
    path = tmp_path / "keymgmt.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)


def test_the_library_never_reads_the_working_directory(write, tmp_path, monkeypatch):
    named, user = tmp_path / "named.toml", tmp_path / "xdg" / "keymgmt" / "keymgmt.toml"
    monkeypatch.chdir(write(GOOD).parent)
    monkeypatch.delenv("KEYMGMT_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    if not Path("/etc/keymgmt/keymgmt.toml").exists():
        with pytest.raises(ConfigError, match="no config file"):
            load_config()
    user.parent.mkdir(parents=True)
    user.write_text("")
    assert load_config().path == user
    named.write_text("")
    monkeypatch.setenv("KEYMGMT_CONFIG", str(named))
    assert load_config().path == named


def test_a_byte_order_mark_of_an_editor_is_no_part_of_the_config(tmp_path):
    path = tmp_path / "keymgmt.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(path).provider_names


def test_a_home_that_is_relative_is_no_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEYMGMT_CONFIG", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in ("keymgmt.toml", ".config/keymgmt/keymgmt.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for home in (".", "", "./"):
        monkeypatch.setenv("HOME", home)
        with contextlib.suppress(ConfigError):
            assert not load_config().path.resolve().is_relative_to(tmp_path)


def test_threads_get_one_provider_and_closing_lets_go_of_it(write):
    config = load_config(write(GOOD))
    made: list[Any] = []
    threads = [
        threading.Thread(target=lambda: made.append(config.provider("hsm"))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(provider) for provider in made}) == 1
    config.close()
    assert made[0].closed == 1
    assert config.provider("hsm") is not made[0]


def test_the_preferred_come_first(write):
    text = "[policy]\nprefer = ['b']\n" + "".join(
        f"[providers.{name}]\nbackend = 'acme'\naddress = 'a'\n" for name in "abc"
    )
    assert load_config(write(text)).provider_names == ("b", "a", "c")


def test_an_unknown_provider_lists_those_that_are_there():
    config = Config({"providers": {"hsm": {"backend": "acme", "address": "a"}}})
    with pytest.raises(ConfigError, match="no provider named 'vault'") as raised:
        config.provider("vault")
    assert raised.value.hint == "configured: hsm"


BACKEND = """
from keymgmt.backend import KeyProvider, Settings

class Login(Settings):
    secret_variables = frozenset({"ODD_TOKEN"})
    kind: str

class OddSettings(Settings):
    login: Login | None = None
    others: list[Login] = []

class Odd(KeyProvider):
    backend = "odd"
    Settings = OddSettings
    wrap = unwrap = check = None
"""


@pytest.mark.parametrize("table", ['login = { kind = "x" }', 'others = [{ kind = "x" }]', ""])
def test_variables_with_secrets_are_those_of_the_tables_and_those_that_a_backend_names(
    write, install, table
):
    install("odd", "keymgmt.backends", {"odd": "odd_keys:Odd"}, odd_keys=BACKEND)
    path = write(
        f'[providers.a]\nbackend = "odd"\n{table}\n'
        '[providers.b]\nbackend = "not-there"\npin = { env = "PIN" }\n'
    )
    with load_config(path) as config:
        assert config.secret_variables == {"PIN"} | ({"ODD_TOKEN"} if table else set())


def test_a_wrong_table_hides_no_variables_with_secrets(write, install):
    """A table that is refused was read as one without secrets, beside one that opens the model."""
    install("odd", "keymgmt.backends", {"odd": "odd_keys:Odd"}, odd_keys=BACKEND)
    path = write(
        '[providers.a]\nbackend = "odd"\n'
        '[providers.b]\nbackend = "odd"\nlogin = { kind = "x" }\nregoin_typo = "x"\n'
    )
    with (
        load_config(path) as config,
        pytest.raises(ConfigError, match=r"\[providers\.b\].*regoin_typo"),
    ):
        _ = config.secret_variables


def test_a_backend_that_is_there_and_broken_hides_no_variables_with_secrets(write, install):
    install("odd", "keymgmt.backends", {"odd": "odd_keys:Odd"}, odd_keys="raise OSError")
    with (
        load_config(write('[providers.b]\nbackend = "odd"\n')) as config,
        pytest.raises(BackendNotInstalled, match="fails to import"),
    ):
        _ = config.secret_variables


def test_that_the_variables_of_a_backend_are_not_known_is_said(write, caplog):
    path = write('[providers.b]\nbackend = "not-there"\npin = { env = "PIN" }\n')
    with load_config(path) as config:
        assert config.secret_variables == {"PIN"}
    (said,) = caplog.messages
    assert "[providers.b]" in said
    assert "not taken from the program" in said


class ProgramSettings(Settings):
    folder: ConfigPath
    workers: int = 1


def test_a_program_reads_its_settings_as_ours_are_read(tmp_path):
    file = tmp_path / "program.toml"
    with pytest.raises(ConfigError) as raised:
        load_settings(file, ProgramSettings, absent="write one")
    assert raised.value.hint == "write one"
    file.write_text('folder = "data"\n')
    assert load_settings(file, ProgramSettings, absent="").folder == tmp_path / "data"
    file.write_text('folder = "data"\nworker = 1\n')
    with pytest.raises(ConfigError, match="worker: unknown key") as raised:
        load_settings(file, ProgramSettings, absent="")
    assert raised.value.hint == "did you mean 'workers'?"
    file.chmod(0o666)
    with pytest.raises(ConfigError, match=r"program\.toml"):
        load_settings(file, ProgramSettings, absent="")
