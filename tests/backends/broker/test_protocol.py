"""What client and service say: one spelling, bounded, and all of it in the report data."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from keymgmt.backend import FormatError, WrappedKey, dump_json

pytest.importorskip("keymgmt_broker")
from keymgmt_broker.protocol import (
    MAX_EVIDENCE,
    MAX_REQUEST,
    NONCE_LENGTH,
    STATUS,
    Request,
    answer_info,
)

pytestmark = pytest.mark.once
WRAPPED = WrappedKey("broker", "resnet50", "3", "hpke-p256", b"blob", {"pk": "0a"})
REQUEST = Request(
    b"n" * NONCE_LENGTH, "hpke-mlkem768-x25519", b"public", WRAPPED, b"context", "sgx", b"evidence"
)


def test_a_request_comes_back_as_it_was():
    assert Request.from_bytes(REQUEST.to_bytes()) == REQUEST


def test_the_report_data_covers_everything_but_the_evidence():
    others = [
        replace(REQUEST, nonce=b"m" * NONCE_LENGTH),
        replace(REQUEST, hpke="hpke-p256"),
        replace(REQUEST, public_key=b"public2"),
        replace(REQUEST, context=b"contexT"),
        replace(REQUEST, kind="tdx"),
        *(
            replace(REQUEST, wrapped=replace(WRAPPED, **change))
            for change in (
                {"key": "resnet51"},
                {"version": "4"},
                {"mechanism": "hpke-p384"},
                {"blob": b"bloB"},
                {"params": {}},
                {"params": {"pk": "0b"}},
                {"params": {"pl": "0a"}},
                {"params": {"pk": "0a", "x": ""}},
            )
        ),
        # The same bytes in a row, cut elsewhere.
        replace(REQUEST, public_key=b"publi", hpke="hpke-p256c"),
        replace(REQUEST, wrapped=replace(WRAPPED, blob=b"blobcon"), context=b"text"),
    ]
    data = [each.report_data for each in (REQUEST, *others)]
    assert len(set(data)) == len(data)
    assert {len(each) for each in data} == {32}
    assert replace(REQUEST, evidence=b"another").report_data == REQUEST.report_data
    assert answer_info(data[0]) != answer_info(data[1])


def test_the_report_data_is_what_it_has_always_been():
    expected = "db3ae724eef60bb0feb8ab4d209fdd546926f7f8056fa66d53fb8528ac8feab7"
    assert REQUEST.report_data.hex() == expected


def changed(**members: Any) -> bytes:
    return dump_json(json.loads(REQUEST.to_bytes()) | members)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        REQUEST.to_bytes() + b" ",
        REQUEST.to_bytes().replace(b'":"', b'": "', 1),
        changed(format="keymgmt-broker-request/2"),
        changed(more="x"),
        changed(nonce=base64.b64encode(b"n" * (NONCE_LENGTH + 1)).decode()),
        changed(nonce="bm5=n"),
        changed(hpke="hpke-none"),
        changed(key="../../sys"),
        changed(key="Resnet"),
        changed(mechanism="a b"),
        changed(params={"pk": "x" * 300}),
        changed(params={str(number): "" for number in range(9)}),
        changed(params=[]),
        changed(blob=""),
        changed(context=base64.b64encode(bytes(1025)).decode()),
        changed(kind="../sgx"),
        changed(kind="é"),
        changed(evidence=base64.b64encode(bytes(MAX_EVIDENCE + 1)).decode()),
        b'{"a":' * 5000,
    ],
)
def test_a_request_that_is_spelled_in_another_way_is_refused(body):
    with pytest.raises(FormatError):
        Request.from_bytes(body)


def test_the_largest_request_fits_its_bound():
    wrapped = WrappedKey(
        "broker", "k" * 64, "v" * 64, "m" * 32, bytes(8192), {f"p{n}": "v" * 60 for n in range(8)}
    )
    largest = Request(
        bytes(NONCE_LENGTH),
        REQUEST.hpke,
        bytes(2048),
        wrapped,
        bytes(1024),
        "sgx",
        bytes(MAX_EVIDENCE),
    )
    body = largest.to_bytes()
    assert len(body) <= MAX_REQUEST
    assert Request.from_bytes(body) == largest


def test_each_word_of_a_refusal_is_a_status_of_http():
    assert all(400 <= status < 600 for status in STATUS.values())
