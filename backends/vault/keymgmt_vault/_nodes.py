"""Which node is asked next: the one that answered last, then those that are well, then the others.

A host name may stand for several machines: each of its addresses is a node of its own. A name is
looked up when it is its turn, and again after one of its nodes failed.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

from keymgmt.backend import ProviderUnavailable, within
from keymgmt_vault._errors import NodeFailure
from keymgmt_vault._transport import Node, Place, Tls

if TYPE_CHECKING:
    from keymgmt_vault._settings import Address, VaultSettings

__all__ = ["Nodes"]

log: Final = logging.getLogger("keymgmt.vault")


class Nodes:
    """The nodes of one provider in one process."""

    def __init__(self, settings: VaultSettings, tls: Tls) -> None:
        self._settings, self._tls = settings, tls
        self._made: dict[tuple[Address, Place], Node] = {}
        self._found: dict[Address, list[Node]] = {}
        # What failed is asked last until then.
        self._rests: dict[Node | Address, float] = {}
        self.current: Node | None = None
        self._addresses = settings.addresses
        for address in self._addresses:
            if place := _known(address):
                self._found[address] = [self._node(address, place)]

    def _node(self, address: Address, place: Place) -> Node:
        node = Node(address, place, self._tls, self._settings.server_name)
        return self._made.setdefault((address, place), node)

    def candidates(self) -> list[Node | Address]:
        """All of them in the order in which to ask; an address is to be looked up first."""
        found: list[Node | Address] = []
        for address in self._addresses:
            found += self._found.get(address) or [address]
        if self.current is not None and self.current not in found:
            found.append(self.current)
        if len(found) == 1:
            return found
        now = time.monotonic()
        return sorted(
            found,
            key=lambda each: (max(0.0, self._rests.get(each, 0.0) - now), each is not self.current),
        )

    def look_up(self, address: Address, seconds: float) -> list[Node]:
        """The nodes of an address; NodeFailure where its name gives none."""
        try:
            found = within(
                seconds,
                f"the name look-up of {address.host}",
                lambda: socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM),
            )
        except socket.gaierror as error:
            kind = "look-up" if error.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM) else "name"
            raise NodeFailure(kind, sent=False) from error
        except ProviderUnavailable as error:
            raise NodeFailure("look-up", sent=False) from error
        nodes = [self._node(address, Place(family, where)) for family, _, _, _, where in found]
        self._found[address] = list(dict.fromkeys(nodes))
        return self._found[address]

    def failed(self, each: Node | Address, failure: Exception, *, rest: bool) -> None:
        """Note a failure; ``rest`` if it says something of the node and not of our haste."""
        if isinstance(each, Node) and not _known(each.address):
            self._found.pop(each.address, None)
        if rest and len(self.candidates()) > 1:
            if each not in self._rests:
                log.warning("%s is passed over: %s", each, failure)
            self._rests[each] = time.monotonic() + 5 * self._settings.call_timeout

    def answered(self, node: Node) -> None:
        """Note that a node is well."""
        if self._rests.pop(node, None) is not None:
            log.warning("%s answers again", node)

    def close(self) -> None:
        """Close the idle connections."""
        for node in list(self._made.values()):
            node.close()


def _known(address: Address) -> Place | None:
    """The place of an address without a name."""
    if address.scheme == "unix":
        return Place(socket.AF_UNIX, address.host)
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError:
        return None
    if version == 4:
        return Place(socket.AF_INET, (address.host, address.port))
    return Place(socket.AF_INET6, (address.host, address.port, 0, 0))
