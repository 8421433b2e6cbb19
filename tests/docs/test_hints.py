"""Every hint that touches trust, in one list: none turns a check off or gives what it asks for.

A hint is followed by people in a hurry. So none proposes to require less, to take a distribution
that was not chosen, or prints the fingerprint that is to be compared. Whoever adds one reads this
first.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from keymgmt.console import clean

TRUST = re.compile(
    r"require_|publishers|fingerprint|distribution|prefer|fallback|minimum_release|\[policy\]"
    r"|sign(ed|er)|trust|unsigned|expired|chose",
    re.IGNORECASE,
)
REVIEWED = {
    "[policy] names allows: {}",
    "[policy] require_attested names the {} that are sealed to",
    "[policy] remember_releases names a file that this user can write",
    "add the publisher's public key to [policy] publishers if you trust it",
    (
        "export it with: keymgmt keys export {} --format pem -o NEW.pem; and name NEW.pem in "
        "[policy] publishers"
    ),
    "have it signed with a key of {}",
    (
        "have the model rewrapped with fewer keys of the backend {}, or name the provider "
        "that holds its key first in [policy] prefer"
    ),
    "have whoever runs the device read its fingerprint out, and give that: --fingerprint HEX",
    "if it should be, add {} to its names in [policy] publishers",
    "install the distribution that the config names, from where you trust it",
    "look where it came from: [policy] publishers names what that key may publish",
    "name one in [policy] publishers",
    "name publishers under [policy] and remove require_signature = false",
    'publishers = { "FILE.pem" = ["MODEL"] } under [policy]',
    "say whose signature each model must have already: --if-signed-by OLD.pem",
    "the config names no [policy] publishers",
    "the recipient file is not the one that was signed; export and sign it again",
    (
        "uninstall the one that you did not choose, or name yours in the provider's table: "
        "distribution = ..."
    ),
    (
        "do not trust what was loaded from it: end this process, and look which process of this "
        "user exchanged it"
    ),
}
FORBIDDEN = re.compile(
    r"(set|accept|with|use|add) [^;]*"
    r"(require_\w+ = false|expired = \"?warn|fallback = \"?use|\[\"\*\"\])"
)


def hints(docs: Any, *packages: str) -> set[str]:
    found: set[str] = set()
    for package, file in docs.sources():
        if packages and package not in packages:
            continue
        for node in ast.walk(ast.parse((docs.ROOT / file).read_bytes())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                found.update(docs.texts(node.value))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                found.update(text for value in node.args[3:4] for text in docs.texts(value))
    return found


def test_the_hints_that_touch_trust_are_these(docs):
    found = hints(docs, "keymgmt")
    assert len(found) > 100
    assert {hint for hint in found if TRUST.search(hint)} == REVIEWED


def test_no_hint_turns_a_check_off(docs):
    found = hints(docs)
    assert not [hint for hint in found if FORBIDDEN.search(hint)]
    assert all(hint == clean(hint) for hint in found)
