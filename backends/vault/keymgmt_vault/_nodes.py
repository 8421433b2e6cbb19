"""The order in which nodes are asked: the node that answered last, the others, the failed ones.

A host name may stand for several machines: each of its addresses is a node of its own. A name is
looked up when its turn comes, and again after one of its nodes failed.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

from keymgmt.backend import ProviderUnavailable, within
from keymgmt_vault._errors import NodeFailure
from keymgmt_vault._transport import Endpoint, Node, Tls

if TYPE_CHECKING:
    from keymgmt_vault._settings import Address, VaultSettings

__all__ = ["Nodes"]

log: Final = logging.getLogger("keymgmt.vault")


class Nodes:
    """The nodes of one provider in one process."""

    def __init__(self, settings: VaultSettings, tls: Tls) -> None:
        self._settings, self._tls = settings, tls
        self._nodes: dict[tuple[Address, Endpoint], Node] = {}
        self._by_address: dict[Address, list[Node]] = {}
        self._asked_last_until: dict[Node | Address, float] = {}
        self.current: Node | None = None
        self._addresses = settings.addresses
        for address in self._addresses:
            if endpoint := _literal(address):
                self._by_address[address] = [self._node(address, endpoint)]

    def _node(self, address: Address, endpoint: Endpoint) -> Node:
        node = Node(address, endpoint, self._tls, self._settings.server_name)
        return self._nodes.setdefault((address, endpoint), node)

    def candidates(self) -> list[Node | Address]:
        """All nodes in the order in which to ask them, and addresses that must be looked up."""
        nodes: list[Node | Address] = []
        for address in self._addresses:
            nodes += self._by_address.get(address) or [address]
        if self.current is not None and self.current not in nodes:
            nodes.append(self.current)
        if len(nodes) == 1:
            return nodes
        now = time.monotonic()
        return sorted(
            nodes,
            key=lambda each: (
                max(0.0, self._asked_last_until.get(each, 0.0) - now),
                each is not self.current,
            ),
        )

    def look_up(self, address: Address, seconds: float) -> list[Node]:
        """The nodes of an address; NodeFailure where its name cannot be resolved."""
        try:
            resolved = within(
                seconds,
                f"the name look-up of {address.host}",
                lambda: socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM),
            )
        except socket.gaierror as error:
            kind = "look-up" if error.errno in (socket.EAI_AGAIN, socket.EAI_SYSTEM) else "name"
            raise NodeFailure(kind, sent=False) from error
        except ProviderUnavailable as error:
            raise NodeFailure("look-up", sent=False) from error
        nodes = [
            self._node(address, Endpoint(family, where)) for family, _, _, _, where in resolved
        ]
        self._by_address[address] = list(dict.fromkeys(nodes))
        return self._by_address[address]

    def failed(self, each: Node | Address, failure: Exception, *, rest: bool) -> None:
        """Note a failure; with ``rest`` the node is asked last for a while."""
        if isinstance(each, Node) and not _literal(each.address):
            self._by_address.pop(each.address, None)
        if rest and len(self.candidates()) > 1:
            if each not in self._asked_last_until:
                log.warning("%s is passed over: %s", each, failure)
            self._asked_last_until[each] = time.monotonic() + 5 * self._settings.call_timeout

    def answered(self, node: Node) -> None:
        """Note that a node answered."""
        if self._asked_last_until.pop(node, None) is not None:
            log.warning("%s answers again", node)

    def close(self) -> None:
        """Close the idle connections."""
        for node in list(self._nodes.values()):
            node.close()


def _literal(address: Address) -> Endpoint | None:
    """The endpoint of an IP address or a Unix socket; None for a host name."""
    if address.scheme == "unix":
        return Endpoint(socket.AF_UNIX, address.host)
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError:
        return None
    if version == 4:
        return Endpoint(socket.AF_INET, (address.host, address.port))
    return Endpoint(socket.AF_INET6, (address.host, address.port, 0, 0))
