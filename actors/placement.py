"""Where ops go: what is known of the nodes, from Redis, put before :mod:`cluster.solver.placement`."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Collection, Sequence

from actors.boot import new_token
from cluster.digest import Digest
from cluster.drain import taking_work
from cluster.errors import ClusterError
from cluster.ref import RefState
from cluster.solver.placement import NodeLoad, PlacedLayer, choose
from cluster.solver_ports import Whereabouts
from storage.presence import Presence

#: Seconds that an op counts as a node's after its scheduler was last heard of.
_TTL_S = 30.0
_RENEWALS = 3


class Placement:
    """Chooses nodes for one scheduler, and tells others what it has put where.

    Args:
        presence: Who is there.
        whereabouts: What is where.
        ops_per_node: Ops that a node runs at once.
    """

    def __init__(self, presence: Presence, whereabouts: Whereabouts, *, ops_per_node: int) -> None:
        self._presence = presence
        self._whereabouts = whereabouts
        self._ops_per_node = ops_per_node
        #: One at a time: of ops that are placed together each is to see where the one before went.
        self._choosing = asyncio.Lock()
        #: What runs, by what names it here: on which node.
        self._running: dict[str, str] = {}

    async def any_node(self) -> str:
        """Return a live node that doesn't drain, another one each time; NodeNotFoundError where there is none."""
        return random.choice(await self._live())  # noqa: S311  # spreads load, keeps no secret

    @contextlib.asynccontextmanager
    async def placed(
        self, vertex: Digest, chains: Sequence[Sequence[RefState]], avoided: Collection[str] = ()
    ) -> AsyncIterator[str]:
        """Give the node for an op over *chains*, and count the op as that node's while the body runs.

        One of *avoided* only where there is no other.

        Raises:
            NodeNotFoundError: no node is alive. NodeDrainingError: all that are drain.
        """
        run_id = new_token()
        try:
            async with self._choosing:
                node = self._running[run_id] = await self._choose(vertex, chains, avoided)
                await self._tell_begun(node, run_id)
            yield node
        finally:
            # Also where it is cancelled while that is told.
            if (chosen := self._running.pop(run_id, None)) is not None:
                await self._tell_ended(chosen, run_id)

    async def renew_forever(self) -> None:
        """Go on telling what runs, until cancelled."""
        while True:
            await asyncio.sleep(_TTL_S / _RENEWALS)
            running = list(self._running.items())
            await asyncio.gather(*(self._tell_begun(node, run_id) for run_id, node in running))
            for run_id, node in running:
                if run_id not in self._running:  # it has ended meanwhile
                    await self._tell_ended(node, run_id)

    async def _choose(self, vertex: Digest, chains: Sequence[Sequence[RefState]], avoided: Collection[str]) -> str:
        nodes = await self._live()
        nodes = [node for node in nodes if node not in avoided] or nodes
        sizes = {state.record.chain: state.record.blob.size_bytes for chain in chains for state in chain}
        located = await self._whereabouts.find(list(sizes), nodes)
        return choose(
            [NodeLoad(node=n, running=located.running.get(n, 0), slots=self._ops_per_node) for n in nodes],
            [
                PlacedLayer(size_bytes=size, here=located.here[chain], arriving=located.arriving[chain])
                for chain, size in sizes.items()
            ],
            spread=vertex,
        )

    async def _live(self) -> list[str]:
        return taking_work(await self._presence.nodes())

    # Hints: where one can't be told, there is one less.

    async def _tell_begun(self, node: str, run_id: str) -> None:
        with contextlib.suppress(ClusterError):
            await self._whereabouts.begin_op(node, run_id, ttl_s=_TTL_S)

    async def _tell_ended(self, node: str, run_id: str) -> None:
        with contextlib.suppress(ClusterError):
            await self._whereabouts.end_op(node, run_id)
