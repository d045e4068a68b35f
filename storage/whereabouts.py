"""Where snapshots are, and which nodes run how many ops, in Redis."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.digest import Digest
from cluster.solver_ports import ARRIVING_S, HERE_S, Located
from storage.keys import Keys
from storage.link import RedisLink
from storage.protocol import Argument

#: Chains noted by one script: some milliseconds in which Redis does nothing else.
_CHAINS = 1000


class RedisWhereabouts:
    """Implements :class:`cluster.solver_ports.Whereabouts` with one sorted set of nodes a snapshot."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    async def note_arriving(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node is getting snapshots."""
        await self._note(node, "arriving", ARRIVING_S, chains)

    async def note_here(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has snapshots."""
        await self._note(node, "here", HERE_S, chains)

    async def note_gone(self, node: str, chains: Sequence[Digest]) -> None:
        """Say that the node has snapshots no more."""
        await self._note(node, "gone", HERE_S, chains)

    async def forget_node(self, node: str) -> None:
        """Forget all snapshots of a node."""
        await self._link.run("snapshots_forget", self._keys.prefix, node, may_repeat=True)

    async def begin_op(self, node: str, run_id: str, *, ttl_s: float) -> None:
        """Say that an op runs on the node."""
        await self._link.run("op_begin", self._keys.prefix, node, run_id, _ms(ttl_s), may_repeat=True)

    async def end_op(self, node: str, run_id: str) -> None:
        """Say that an op runs there no more."""
        await self._link.execute("ZREM", self._keys.ops(node), run_id, may_repeat=True)

    async def find(self, chains: Sequence[Digest], nodes: Sequence[str]) -> Located:
        """Return what is known."""
        if not nodes:
            return Located(
                here=dict.fromkeys(chains, frozenset()), arriving=dict.fromkeys(chains, frozenset()), running={}
            )
        arguments: tuple[Argument, ...] = (_ms(HERE_S), _ms(ARRIVING_S), len(nodes), *nodes, *chains)
        running, *found = await self._link.run("snapshots_find", self._keys.prefix, *arguments, may_repeat=True)
        named = [frozenset(nodes[place] for place in places) for places in found]
        return Located(
            here=dict(zip(chains, named[::2], strict=True)),
            arriving=dict(zip(chains, named[1::2], strict=True)),
            running=dict(zip(nodes, running, strict=True)),
        )

    async def _note(self, node: str, what: str, ttl_s: float, chains: Sequence[Digest]) -> None:
        for start in range(0, len(chains), _CHAINS):
            arguments: tuple[Argument, ...] = (node, what, _ms(ttl_s), *chains[start : start + _CHAINS])
            await self._link.run("snapshots_note", self._keys.prefix, *arguments, may_repeat=True)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
