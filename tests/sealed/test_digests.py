"""The hash tree: RFC 9162's shape, checked against Certificate Transparency's known roots."""

from __future__ import annotations

import hashlib

import pytest
from blake3 import blake3

from keymgmt.sealed.digests import leaf_hash, tree_root

# The test inputs of RFC 6962's reference implementation, and the root over the first 1, 2, ... 8.
INPUTS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(1, 9))
def test_known_roots(count):
    leaves = b"".join(leaf_hash("sha256", data) for data in INPUTS[:count])
    assert tree_root("sha256", leaves).hex() == ROOTS[count - 1]


def test_blake3_tree_has_the_same_shape():
    a, b, c = (blake3(b"\0" + data).digest() for data in INPUTS[:3])
    assert [leaf_hash("blake3", data) for data in INPUTS[:3]] == [a, b, c]
    left = blake3(b"\1" + a + b).digest()
    assert tree_root("blake3", a + b + c) == blake3(b"\1" + left + c).digest()
    assert tree_root("blake3", a) == a


def test_no_leaf_passes_for_a_node():
    a, b = (hashlib.sha256(b"\0" + data).digest() for data in INPUTS[:2])
    assert leaf_hash("sha256", a + b) != tree_root("sha256", a + b)


@pytest.mark.parametrize("leaves", [b"", bytes(31), bytes(33)])
def test_what_is_no_row_of_hashes_is_refused(leaves):
    with pytest.raises(ValueError, match="leaf"):
        tree_root("sha256", leaves)
