"""The RFC's own examples (RFC 7512, section 3), and what its grammar forbids.

An example that names more than a token is refused for what it names.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keymgmt_pkcs11._uri import parse_uri

EXAMPLES: dict[str, dict[str, str] | str] = {
    "pkcs11:": {},
    "pkcs11:object=my-pubkey;type=public": "the token only",
    "pkcs11:object=my-key;type=private?pin-source=file:/etc/token": "the token only",
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
    "model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial="
    "?pin-source=file:/etc/token_pin": "the token only",
    "pkcs11:object=my-sign-key;type=private?module-name=mypkcs11": "the token only",
    "pkcs11:object=my-sign-key;type=private?module-path=/mnt/libmypkcs11.so.1": "the token only",
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc."
    "?pin-value=the-pin": "must not hold a PIN",
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
    "model=1.0;serial=?module-path=/mnt/libmypkcs11.so.1": {
        "token": "The Software PKCS#11 Softtoken",
        "manufacturer": "Snake Oil, Inc.",
        "model": "1.0",
        "serial": "",
        "module-path": "/mnt/libmypkcs11.so.1",
    },
    "pkcs11:slot-description=Sun%20Metaslot": {"slot-description": "Sun Metaslot"},
    "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;"
    "library-description=Soft%20Token%20Library;library-version=1.23": {
        "library-manufacturer": "Snake Oil, Inc.",
        "library-description": "Soft Token Library",
        "library-version": "1.23",
    },
    "pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3": {
        "token": "My token% created by Joe",
        "library-version": "3",
    },
    "pkcs11:library-version=3;id=%01%02%03%Ba%dd%Ca%fe%04%05%06": "the token only",
    "pkcs11:token=A%20name%20with%20a%20substring%20%25%3B": {
        "token": "A name with a substring %;"
    },
    "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1": {
        "token": "Name with a small A with acute: \u00e1"
    },
    "pkcs11:token=my-token;vendor-aaa=value-a": "'vendor-aaa' is not known",
    "pkcs11:token=my-token?vendor-bbb=value-b": "'vendor-bbb' is not known",
    "pkcs11:token=a?module-name=mypkcs11": "module-name is not a path",
    "pkcs11:token=a?pin-source=%7Cprogram": "must not hold a PIN",
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
    "pkcs11:?module-path=/a&module-path=/b": "twice",
    "pkcs11:token=a b": "%XX",
    "pkcs11:token=a/b": "%XX",
    "pkcs11:token=%2": "%XX",
    "pkcs11:token=%GG": "%XX",
    "pkcs11:token=\u00e1": "%XX",
    "pkcs11:token=a#b": "%XX",
    "pkcs11:token=%FF": "UTF-8",
    "pkcs11:slot-id=0x1": "slot-id",
    "pkcs11:slot-id=": "slot-id",
    "pkcs11:library-version=1.2.3": "library-version",
    "pkcs11:?module-path=m.so": "an absolute path",
    "pkcs11:module-path=/m.so": "not known before '[?]'",
    "pkcs11:?token=a": "not known after '[?]'",
    "pkcs11:to\u212aen=a": "no valid name",
    "pkcs11:token=" + "a" * 5000: "longer",
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_of_the_rfc(text):
    means = EXAMPLES[text]
    if isinstance(means, dict):
        assert parse_uri(text) == means
        return
    with pytest.raises(ValueError, match=means):
        parse_uri(text)


@pytest.mark.parametrize("text", WRONG)
def test_what_the_grammar_forbids(text):
    with pytest.raises(ValueError, match=WRONG[text]) as caught:
        parse_uri(text)
    assert "an example is" in str(caught.value)


def test_a_pin_is_never_repeated():
    for part in ("pin-value=12 secret 34", "module-path=secret\x00"):
        with pytest.raises(ValueError, match="RFC 7512") as caught:
            parse_uri(f"pkcs11:token=a?{part}")
        assert "secret" not in str(caught.value)


@given(st.text(max_size=80))
def test_any_text_parses_or_is_an_error(text):
    for candidate in (text, f"pkcs11:{text}", f"pkcs11:token={text}", f"pkcs11:?{text}"):
        try:
            parse_uri(candidate)
        except ValueError:
            continue
