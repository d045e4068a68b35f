"""Collection on one node's disk: snapshots, cached blobs and cache mounts that nothing needs there.

Who needs a snapshot is known in two places. Leases hold refs, and with them the snapshots of their chains: Redis says
which. And processes of the node have it mounted, stand on it or read it: its lock says so. Between the first and the
second another process may begin to need it, so a snapshot says when it was used last:

    t=0  this looks: snapshot X was used last at u; no lease holds its chain
    t=1  a caller attaches X to its lease, finds it here, and marks it used
    t=2  this would remove X: it was not used last at u, and stays

A caller that marked it used before t=0 had attached it before that, and its lease is seen.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, assert_never

import structlog

from cluster.collect.node_stock import BlobState, CacheState, NodeStock, SnapshotState
from cluster.collect.plan import plan, total_bytes
from cluster.collect.policy import KeepPolicy
from cluster.collect.runner import Pruned
from cluster.collect.values import Item
from cluster.digest import Digest
from cluster.errors import ClusterError
from cluster.ports import RefStore
from cluster.solver_ports import Whereabouts
from storage.containers.caches import Caches
from storage.node_cache import NodeCache
from storage.snapshots import LayeredSnapshotter

_log = structlog.get_logger(__name__)

#: Seconds that making room may take before whoever waits for it looks for itself.
_MAKE_ROOM_S: Final = 600.0
_DESCRIBED: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """What lies on a node's disk, and what is free there."""

    items: tuple[Item, ...]
    free_bytes: int
    disk_bytes: int


class NodeCollector:
    """Collects on one node. Any number, in any of its processes, may be at work at once.

    Made on the event loop that it is to be used on.

    Args:
        node: Its ID.
        root: A directory on its disk.
        snapshotter: Its snapshots.
        cache: Its compressed blobs.
        caches: Its cache mounts.
        refs: Says which leases hold what.
        whereabouts: Is told which snapshots went.
        now_wall_s: The wall clock of the node, which last uses are told by.
        free_bytes: Returns the free bytes of the disk; None: as the disk itself says.
    """

    def __init__(
        self,
        *,
        node: str,
        root: Path,
        snapshotter: LayeredSnapshotter,
        cache: NodeCache,
        caches: Caches,
        refs: RefStore,
        whereabouts: Whereabouts,
        now_wall_s: Callable[[], float],
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._node = node
        self._root = root
        self._snapshotter = snapshotter
        self._cache = cache
        self._caches = caches
        self._refs = refs
        self._whereabouts = whereabouts
        self._now_wall_s = now_wall_s
        self._free_bytes = free_bytes or (lambda: shutil.disk_usage(root).free)
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"NodeCollector({self._node!r}, {str(self._root)!r})"

    async def usage(self) -> DiskUsage:
        """Return what takes how much, and what holds it.

        Raises:
            UnavailableError: Redis doesn't answer.
            SnapshotError, ContainerError: the disk refused.
        """
        stock = await self._described(await self._stock())
        disk = await asyncio.to_thread(shutil.disk_usage, self._root)
        return DiskUsage(items=tuple(stock.items()), free_bytes=self._free_bytes(), disk_bytes=disk.total)

    async def prune(self, policy: KeepPolicy, *, is_dry_run: bool = False) -> Pruned:
        """Remove what a policy lets go; what is taken up meanwhile stays. Cancelled, it leaves nothing half done.

        Args:
            policy: What may go.
            is_dry_run: Only say what would go.

        Raises:
            UnavailableError: Redis doesn't answer; nothing has gone.
            SnapshotError, ContainerError: the disk refused, and nothing could be removed.
        """
        async with self._turn:
            return await self._prune(await self._described(await self._stock()), policy, is_dry_run=is_dry_run)

    async def collect(self, policies: Sequence[KeepPolicy]) -> list[Pruned]:
        """Apply policies one after the other, at least one; return what each took. Raises as :meth:`prune`."""
        found: list[Pruned] = []
        async with self._turn:
            await asyncio.to_thread(self._caches.recover)
            stock = await self._stock()
            for policy in policies:
                if found and found[-1].items:
                    stock = await self._stock()
                found.append(await self._prune(stock, policy))
        return found

    def make_room(self, wanted_bytes: int) -> int:
        """Remove the least useful of what nothing needs until so many bytes more are free; return how many are.

        Blocks, for minutes at most: called from any thread but the event loop's. Without Redis no snapshot goes, as any
        may be held.

        Raises:
            SnapshotError, ContainerError: the disk refused.
        """
        making = asyncio.run_coroutine_threadsafe(self._make_room(wanted_bytes), self._loop)
        try:
            return making.result(_MAKE_ROOM_S)
        except TimeoutError:
            making.cancel()
            return 0

    async def _make_room(self, wanted_bytes: int) -> int:
        async with self._turn:
            try:
                stock = await self._stock()
            except ClusterError:
                stock = await self._stock(asks=False)
            kept = max(0, total_bytes(stock.items()) - wanted_bytes)
            # A limit of 0 means none: then all that may go is wanted, and no limit says that, too.
            pruned = await self._prune(stock, KeepPolicy(includes_shared=True, max_used_bytes=kept))
        return pruned.freed_bytes

    async def _stock(self, *, asks: bool = True) -> NodeStock:
        """Read everything. Leases last: see above."""

        def look() -> NodeStock:
            # Mounts first: one that is made later is of a snapshot that is used since.
            mounts = self._snapshotter.mounted()
            return NodeStock(
                mounts=mounts,
                snapshots=self._snapshotter.states(),
                blobs=self._cache.states(),
                caches=self._caches.states(),
                uses=None,
            )

        stock = await asyncio.to_thread(look)
        if not asks:
            return stock
        chains = [snapshot.chain for snapshot in stock.snapshots]
        uses = await self._refs.uses_of_chains(chains) if chains else []
        return replace(stock, uses=dict(zip(chains, uses, strict=True)))

    async def _described(self, stock: NodeStock) -> NodeStock:
        """Say of each snapshot what refs it is of, as far as that is still recorded."""
        uses = stock.uses or {}
        wanted = list(dict.fromkeys(ref for use in uses.values() for ref in use.refs[:1]))
        states = await self._refs.get(wanted) if wanted else []
        said = {
            state.record.id: state.record.description or ", ".join(state.record.image_refs[:_DESCRIBED])
            for state in states
            if state is not None
        }
        return replace(
            stock, descriptions={chain: said.get(use.refs[0], "") for chain, use in uses.items() if use.refs}
        )

    async def _prune(self, stock: NodeStock, policy: KeepPolicy, *, is_dry_run: bool = False) -> Pruned:
        items, states = stock.items(), stock.states()
        going = plan(items, policy, now_wall_s=self._now_wall_s(), free_bytes=self._free_bytes())
        if is_dry_run:
            return Pruned(items=tuple(going), freed_bytes=sum(item.size_bytes for item in going), is_dry_run=True)
        removed: list[Item] = []
        chains: list[Digest] = []
        failure: ClusterError | None = None
        for item in going:
            state = states[item.id]
            try:
                is_gone = await asyncio.to_thread(self._remove, stock, state)
            except ClusterError as exc:  # on a full disk one may need what the next one gives
                _log.warning("node.unremoved", item=item.id, error=str(exc), error_type=type(exc).__name__)
                failure = exc
                continue
            if is_gone:
                removed.append(item)
                if isinstance(state, SnapshotState):
                    chains.append(state.chain)
        if chains:
            with suppress(ClusterError):  # a hint
                await self._whereabouts.note_gone(self._node, chains)
        if failure is not None and not removed:
            raise failure
        return Pruned(
            items=tuple(removed),
            freed_bytes=sum(item.size_bytes for item in removed),
            kept=len(going) - len(removed),
        )

    def _remove(self, stock: NodeStock, state: SnapshotState | BlobState | CacheState) -> bool:
        match state:
            case SnapshotState():
                for mount in stock.mounts_of(state.chain):
                    if self._snapshotter.unmount_idle(mount.name, last_used_ns=mount.last_used_ns):
                        return False
                return not self._snapshotter.remove(state.chain, last_used_ns=state.last_used_ns)
            case BlobState():
                self._cache.remove(state.digest)
                return True
            case CacheState():
                return not self._caches.remove(state.name)
            case _:
                assert_never(state)
