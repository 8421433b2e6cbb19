"""The RFC's own examples (RFC 7512, section 3), and what its grammar forbids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keymgmt_pkcs11._uri import Pkcs11Uri

from keymgmt.backend import ConfigError

ID = bytes.fromhex("69953e5cf4bdec91")
SOFT = "The Software PKCS#11 Softtoken"

EXAMPLES = {
    "pkcs11:": Pkcs11Uri(),
    "pkcs11:object=my-pubkey;type=public": Pkcs11Uri({"object": "my-pubkey", "type": "public"}),
    "pkcs11:object=my-key;type=private?pin-source=file:/etc/token": Pkcs11Uri(
        {"object": "my-key", "type": "private"}, query={"pin-source": "file:/etc/token"}
    ),
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
    "model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial="
    "?pin-source=file:/etc/token_pin": Pkcs11Uri(
        {
            "token": SOFT,
            "manufacturer": "Snake Oil, Inc.",
            "model": "1.0",
            "object": "my-certificate",
            "type": "cert",
            "serial": "",
        },
        ID,
        {"pin-source": "file:/etc/token_pin"},
    ),
    "pkcs11:object=my-sign-key;type=private?module-name=mypkcs11": Pkcs11Uri(
        {"object": "my-sign-key", "type": "private"}, query={"module-name": "mypkcs11"}
    ),
    "pkcs11:object=my-sign-key;type=private?module-path=/mnt/libmypkcs11.so.1": Pkcs11Uri(
        {"object": "my-sign-key", "type": "private"},
        query={"module-path": "/mnt/libmypkcs11.so.1"},
    ),
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc."
    "?pin-value=the-pin": Pkcs11Uri(
        {"token": "Software PKCS#11 softtoken", "manufacturer": "Snake Oil, Inc."},
        query={"pin-value": "the-pin"},
    ),
    "pkcs11:slot-description=Sun%20Metaslot": Pkcs11Uri({"slot-description": "Sun Metaslot"}),
    "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;"
    "library-description=Soft%20Token%20Library;library-version=1.23": Pkcs11Uri(
        {
            "library-manufacturer": "Snake Oil, Inc.",
            "library-description": "Soft Token Library",
            "library-version": "1.23",
        }
    ),
    "pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3;"
    "id=%01%02%03%Ba%dd%Ca%fe%04%05%06": Pkcs11Uri(
        {"token": "My token% created by Joe", "library-version": "3"},
        bytes.fromhex("010203baddcafe040506"),
    ),
    "pkcs11:token=A%20name%20with%20a%20substring%20%25%3B;object=my-certificate;type=cert": (
        Pkcs11Uri(
            {"token": "A name with a substring %;", "object": "my-certificate", "type": "cert"}
        )
    ),
    "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;"
    "object=my-certificate;type=cert": Pkcs11Uri(
        {
            "token": "Name with a small A with acute: \u00e1",
            "object": "my-certificate",
            "type": "cert",
        }
    ),
    "pkcs11:token=my-token;object=my-certificate;type=cert;vendor-aaa=value-a"
    "?pin-source=file:/etc/token_pin&vendor-bbb=value-b": Pkcs11Uri(
        {"token": "my-token", "object": "my-certificate", "type": "cert"},
        query={"pin-source": "file:/etc/token_pin"},
        vendor={"vendor-aaa": ("value-a",), "vendor-bbb": ("value-b",)},
    ),
    "pkcs11:object=a?pin-source=%7Cprogram&x=1&x=2": Pkcs11Uri(
        {"object": "a"}, query={"pin-source": "|program"}, vendor={"x": ("1", "2")}
    ),
}

WRONG = {
    "": "begin with",
    "pkcs12:token=a": "begin with",
    "token=a": "begin with",
    "pkcs11:token": "no '='",
    "pkcs11:;": "no valid name",
    "pkcs11:token=a;": "no valid name",
    "pkcs11:token=a;;serial=1": "no valid name",
    "pkcs11:token=a;token=b": "twice",
    "pkcs11:id=%01;id=%01": "twice",
    "pkcs11:x=1;x=2": "twice",
    "pkcs11:?pin-value=a&pin-value=b": "twice",
    "pkcs11:?pin-value=a&pin-source=b": "both",
    "pkcs11:token=a b": "%XX",
    "pkcs11:token=a/b": "%XX",
    "pkcs11:token=%2": "%XX",
    "pkcs11:token=%GG": "%XX",
    "pkcs11:token=\u00e1": "%XX",
    "pkcs11:token=a#b": "%XX",
    "pkcs11:token=%FF": "UTF-8",
    "pkcs11:type=key": "'type'",
    "pkcs11:slot-id=0x1": "slot-id",
    "pkcs11:slot-id=": "slot-id",
    "pkcs11:library-version=1.2.3": "library-version",
    "pkcs11:pin-value=1234": "after '?'",
    "pkcs11:?token=a": "before '?'",
    "pkcs11:to\u212aen=a": "no valid name",
    "pkcs11:token=" + "a" * 5000: "longer",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_of_the_rfc(text: str) -> None:
    assert Pkcs11Uri.parse(text) == EXAMPLES[text]


@pytest.mark.parametrize("text", WRONG)
def test_what_the_grammar_forbids(text: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[text]) as caught:
        Pkcs11Uri.parse(text)
    assert caught.value.hint


def test_a_pin_is_never_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        Pkcs11Uri.parse("pkcs11:token=a?pin-value=12 secret 34")
    assert "secret" not in str(caught.value)
    assert "secret" not in str(caught.value.hint)


@given(st.text(max_size=80))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    for candidate in (text, f"pkcs11:{text}", f"pkcs11:token={text}", f"pkcs11:?{text}"):
        try:
            Pkcs11Uri.parse(candidate)
        except ConfigError:
            continue
