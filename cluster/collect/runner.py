"""Collection: looks at what there is, decides by policy, and has the store end what nothing holds. DESIGN §6."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cluster.collect.plan import freed_bytes, plan
from cluster.collect.policy import KeepPolicy
from cluster.collect.ports import CollectStore, Outcome, Removal
from cluster.collect.stock import Kept, Stock, Usage
from cluster.collect.values import Item, ItemKind
from cluster.errors import ClusterError, RefNotFoundError
from cluster.faultpoints import FaultPoint, ahit
from cluster.ports import LeaseStore, RefStore
from cluster.ref import RefId

#: Removals under way at once.
_AT_ONCE = 50
#: Seconds after which an object that could not be deleted is tried again.
_AGAIN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a prune took, or would take."""

    #: In the order in which it went.
    items: tuple[Item, ...]
    #: Bytes of objects that are deleted after the grace; for a dry run, of what the items take.
    freed_bytes: int
    #: Items of the plan that were taken up meanwhile, and stay.
    kept: int = 0
    is_dry_run: bool = False


class Collector:
    """Collects refs, images and blobs. Moves no byte; any number may be at work at once.

    Args:
        refs: What is recorded.
        leases: Who holds it.
        store: Ends it.
        grace_s: Seconds between the end of a blob and that of its object.
    """

    def __init__(self, *, refs: RefStore, leases: LeaseStore, store: CollectStore, grace_s: float) -> None:
        self._refs = refs
        self._leases = leases
        self._store = store
        self._grace_s = grace_s

    async def stock(self) -> Stock:
        """Read everything. Leases after refs: what is recorded under one after the refs were read is not judged.

        Drivers' directories after leases: see :meth:`cluster.collect.ports.CollectStore.locals`.
        """
        states = [state for state in await self._refs.get(await self._refs.list_refs()) if state is not None]
        usages, images, resolved, blobs = await asyncio.gather(
            self._store.usages(), self._refs.images(), self._store.resolved(), self._store.blobs()
        )
        leases = await self._leases.leases()
        return Stock(
            states={state.record.id: state for state in states},
            usages=usages,
            images=images,
            resolved=resolved,
            leases=leases,
            blobs=blobs,
            local=await self._store.locals(),
        )

    async def usage(self) -> Usage:
        """Return what takes how much, and what of it is in use."""
        return (await self.stock()).usage()

    async def kept(self, ref_id: RefId) -> Kept:
        """Return why a ref is kept; RefNotFoundError if it is unknown."""
        stock = await self.stock()
        if ref_id not in stock.states:
            raise RefNotFoundError(ref_id)
        return stock.kept(ref_id)

    async def prune(
        self,
        policy: KeepPolicy,
        *,
        is_dry_run: bool = False,
        on_removed: Callable[[Item], object] = lambda _: None,
        on_stock: Callable[[Stock], object] = lambda _: None,
    ) -> Pruned:
        """Remove what a policy lets go, and blobs that nothing has any more.

        What was taken up between the look and the removal stays, and what stands below it. Cancelled at any point,
        it leaves nothing half done.

        Args:
            policy: What may go.
            is_dry_run: Only say what would go.
            on_removed: Told of each item that went.
            on_stock: Told what there was before.
        """
        stock = await self.stock()
        on_stock(stock)
        items = stock.items()
        going = plan(items, policy, now_wall_s=await self._store.now_wall_s())
        # They are no items, and match no filter.
        orphans = [] if policy.filters else stock.orphans()
        if is_dry_run:
            freed = freed_bytes(items, going) + stock.size_of([*stock.documents_of(going), *orphans])
            return Pruned(items=tuple(going), freed_bytes=freed, is_dry_run=True)
        if going or orphans:  # what goes by the index needs it whole
            await self._store.index([state.record for state in stock.states.values()])
        await ahit(FaultPoint.COLLECT_PLANNED)
        removed, freed = await self._remove(stock, going, on_removed)
        condemned = await self._store.condemn(orphans, grace_s=self._grace_s)
        return Pruned(
            items=tuple(removed),
            freed_bytes=freed + sum(size or 0 for size in condemned),
            kept=len(going) - len(removed),
        )

    async def delete_due(self, delete: Callable[[str], Awaitable[None]]) -> int:
        """Delete the objects of blobs that ended long enough ago, by *delete*; return how many.

        Stopped at any point, the next one goes on: an object may be deleted twice, and its key is never used again.

        Raises:
            ClusterError: what *delete* raised, when all others are deleted, or where it fails for all. These come
                again in a while.
        """
        count = 0
        failure: ClusterError | None = None
        while due := await self._store.due(_AT_ONCE):
            outcomes = await asyncio.gather(*(_outcome(delete(doomed.key)) for doomed in due))
            await ahit(FaultPoint.COLLECT_OBJECT_DELETED)
            gone = [doomed for doomed, error in zip(due, outcomes, strict=True) if error is None]
            await self._store.deleted(gone)
            if len(gone) < len(due):
                failure = next(error for error in outcomes if error is not None)
                await self._store.put_off([doomed for doomed in due if doomed not in gone], by_s=_AGAIN_S)
            if not gone:
                break  # it is the content store that is away
            count += len(gone)
        if failure is not None:
            raise failure
        return count

    async def _remove(
        self, stock: Stock, going: Sequence[Item], on_removed: Callable[[Item], object]
    ) -> tuple[list[Item], int]:
        removed: list[Item] = []
        freed = 0
        for batch in _independent(going):
            for item, removal in zip(batch, await asyncio.gather(*(self._end(stock, i) for i in batch)), strict=True):
                if removal.outcome in (Outcome.REMOVED, Outcome.MISSING):
                    removed.append(item)
                    freed += removal.freed_bytes
                    on_removed(item)
            await ahit(FaultPoint.COLLECT_REMOVED)
        return removed, freed

    async def _end(self, stock: Stock, item: Item) -> Removal:
        images = stock.images_of_item(item)
        if images:
            return await self._store.remove_image(images, grace_s=self._grace_s)
        if item.kind is ItemKind.LOCAL:
            tree = stock.tree_of_item(item)
            if tree is None:
                return await self._store.remove_local_object(item.id, grace_s=self._grace_s)
            return await self._store.remove_tree(tree, grace_s=self._grace_s)
        ref_id = RefId(item.id)
        return await self._store.remove_ref(ref_id, stock.images_of(ref_id), grace_s=self._grace_s)


async def _outcome(deleting: Awaitable[None]) -> ClusterError | None:
    try:
        await deleting
    except ClusterError as exc:
        return exc
    return None


def _independent(going: Sequence[Item]) -> list[list[Item]]:
    """Return the items in batches, none of which has an item and what it stands on; in their order."""
    batches: list[list[Item]] = []
    blocked: set[str] = set()
    batch: list[Item] = []
    for item in going:
        if item.id in blocked or len(batch) == _AT_ONCE:
            batches.append(batch)
            batch, blocked = [], set()
        batch.append(item)
        blocked.update(item.parents)
    return [*batches, batch] if batch else batches
