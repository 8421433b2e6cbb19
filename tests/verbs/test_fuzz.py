"""The law: any bytes, in any file of a sealed model, either open or raise KeymgmtError.

Within bounded memory and time; and whatever opens gives exactly what was sealed, unless a holder of
the data key changed it. CI runs 2000 examples for each file, over bytes and JSON, signed and not;
`make nightly` four times as many, and tests/fuzz finds its own way through the parsers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keymgmt
from keymgmt import errors
from keymgmt._system.strict_json import dump_json

pytestmark = pytest.mark.once

NIGHTLY = os.environ.get("KEYMGMT_TEST_NIGHTLY")
EXAMPLES = 2000 if NIGHTLY else 500 if os.environ.get("CI") else 50
LAW = settings(
    max_examples=EXAMPLES, deadline=5000, suppress_health_check=list(HealthCheck), database=None
)

scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**54), 2**54),
    st.text(max_size=80),
    st.sampled_from(["", "a", "..", "../x", "a/b", "0" * 64, "keymgmt-sealed/1", "AA==", "\x00"]),
)
anything = st.recursive(
    scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=8,
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, changes) -> bytes:
    out = bytearray(data)
    for what, where, extra in changes:
        at = int(where * len(out))
        if what == "flip" and out:
            out[min(at, len(out) - 1)] ^= extra[0] or 1
        elif what == "cut":
            del out[at : at + len(extra)]
        elif what == "insert":
            out[at:at] = extra
        elif what == "repeat":
            out[at:at] = out[at : at + 8 * len(extra)]
    return bytes(out)


def places(value, path=()):
    """Every place of a JSON value that can be replaced."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def put(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = put(value[path[0]], path[1:], new)
    return copied


@pytest.fixture
def sealed(site):
    path = site.seal("local:a+local:b", "local:c")
    return path, {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def config(request, site):
    """With signatures required little gets past them; without, everything behind is reached."""
    return site.config() if request.param else site.config(publishers={}, require_signature=False)


def obeys(path: Path, config, name: str, data: bytes, originals, site) -> None:
    file = path / name
    file.write_bytes(data)
    try:
        with keymgmt.open(path, keys=config) as model:
            for entry in model.manifest.files:
                assert model.read(entry.path) == (site.plain / entry.path).read_bytes()
    except errors.KeymgmtError:
        pass
    finally:
        file.write_bytes(originals[file])


@pytest.mark.parametrize(
    "name", ["manifest.json", "keys.json", "signatures.json", "payload/model.bin.floe"]
)
def test_any_bytes(sealed, config, site, name):
    path, originals = sealed

    @LAW
    @given(changes=edits)
    def law(changes):
        obeys(path, config, name, mutate(originals[path / name], changes), originals, site)

    law()


@pytest.mark.parametrize("name", ["manifest.json", "keys.json", "signatures.json"])
def test_any_json(sealed, config, site, name):
    """Canonical JSON of the right outline, so that the checks behind the parser are reached."""
    path, originals = sealed
    value = json.loads(originals[path / name])
    every = list(places(value))

    @LAW
    @given(place=st.sampled_from(every), new=anything)
    def law(place, new):
        try:
            data = dump_json(put(value, place, new))
        except errors.FormatError:
            return
        obeys(path, config, name, data, originals, site)

    law()
