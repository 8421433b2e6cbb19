"""A kind of evidence of the tests, in place of those that the service verifies.

Run as a program it is ``keymgmt``, with that kind; the service's workers import it again.
"""

from __future__ import annotations

from typing import Any, Literal

from keymgmt_broker_service import _verify

from keymgmt.backend import Settings


class MadePolicy(Settings):
    evidence: Literal["sgx"]


def evidence_of(report_data: bytes) -> bytes:
    return b"made for " + report_data


def verify(evidence: bytes, report_data: bytes, *_: Any) -> _verify.Claims:
    if evidence == b"the collateral is old":
        raise _verify.NotReady("the collateral is old")
    if evidence != evidence_of(report_data):
        raise _verify.Refused("the report data is another")
    return _verify.Claims("sgx", {"made": "yes"})


_verify.AnyPolicy = MadePolicy  # type: ignore[misc,assignment]
_verify.verify = verify

if __name__ == "__main__":
    from keymgmt.cli import main

    main()
