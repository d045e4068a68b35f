"""Refs as a driver has them: metadata at hand, bytes only when they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from cluster.digest import EMPTY_CHAIN
from cluster.drain import taking_work
from cluster.errors import RefReleasedError
from cluster.messages import ExtractResult, NodeRecord, UnlazyResult
from cluster.provider import DescHandler
from cluster.ref import ImageRecord, RefId, RefState
from lazyfarm.cli.human import short
from lazyfarm.notebook import layers_table
from lazyfarm.operation import Operation, ProgressCallback, ProgressStreams


class RefFarm(ProgressStreams, Protocol):
    """What refs ask of their farm."""

    async def nodes(self) -> list[NodeRecord]:
        """Return the cluster's nodes."""
        ...

    async def states(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Return the records of refs, in bulk."""
        ...

    async def unlazy_chain(self, ref: Ref, stream: str | None) -> UnlazyResult:
        """Unlazy a ref's whole chain."""
        ...

    async def extract_chain(self, ref: Ref, node: str | None, stream: str | None) -> ExtractResult:
        """Extract a ref's chain on a node."""
        ...


class Ref:
    """An image's layers, or a chain of them: lazy until somebody needs the bytes.

    Metadata never pulls: every attribute is what was known when the ref was read.
    """

    def __init__(
        self, farm: RefFarm, layers: Sequence[RefState], image: ImageRecord | None, handlers: Sequence[DescHandler] = ()
    ) -> None:
        self._farm = farm
        self._layers = tuple(layers)
        self._image = image
        self._handlers = tuple(handlers)
        self._is_released = False

    def __repr__(self) -> str:
        lazy = sum(state.is_lazy for state in self._layers)
        return f"<Ref {self.id[:19]} {self.image or 'no image'}: {len(self._layers)} layers, {lazy} lazy>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return layers_table(self.image or short(self.id), self._layers)

    @property
    def id(self) -> RefId:
        """Return the ID of the top layer's ref: its blob chain ID."""
        return self._layers[-1].record.id if self._layers else RefId(EMPTY_CHAIN)

    @property
    def image(self) -> str:
        """Return the normalised name of the image it came from; "" where it came from none."""
        return self._image.name if self._image else ""

    @property
    def digest(self) -> str:
        """Return the digest of the image's manifest; "" where it came from none."""
        return self._image.manifest.digest if self._image else ""

    @property
    def record(self) -> ImageRecord | None:
        """Return the image's record."""
        return self._image

    @property
    def layers(self) -> tuple[RefState, ...]:
        """Return the layers, lowest first, as they were when this was read."""
        return self._layers

    @property
    def is_lazy(self) -> bool:
        """Tell whether any layer was not in the content store when this was read."""
        return any(state.is_lazy for state in self._layers)

    @property
    def handlers(self) -> tuple[DescHandler, ...]:
        """Return the providers this ref was made with."""
        return self._handlers

    def unlazy(self, *, progress: ProgressCallback | None = None) -> Operation[UnlazyResult]:
        """Make every blob present in the content store.

        Raises:
            NeedsRemoteProvidersError: a lazy layer has no provider this driver may use.
            ClusterError: a layer can't be had.
        """
        return Operation(self._farm, self._unlazy, progress)

    async def _unlazy(self, stream: str | None) -> UnlazyResult:
        self.raise_if_released()
        if not self._layers:
            return UnlazyResult(ref_id=self.id, layers=())
        result = await self._farm.unlazy_chain(self, stream)
        await self.refresh()
        return result

    def extract(self, node: str | None = None, *, progress: ProgressCallback | None = None) -> Operation[ExtractResult]:
        """Unlazy, bring to *node* (None: any), unpack and mount; the result's ``path`` is there.

        Raises:
            NodeNotFoundError: no such live node.
            ClusterError: a layer can't be had or unpacked.
        """
        return Operation(self._farm, lambda stream: self._extract(node, stream), progress)

    def extract_everywhere(self, *, progress: ProgressCallback | None = None) -> Operation[list[ExtractResult]]:
        """Extract on every live node that doesn't drain, at once; each blob is fetched once for all of them."""
        return Operation(self._farm, self._extract_everywhere, progress)

    async def _extract(self, node: str | None, stream: str | None) -> ExtractResult:
        self.raise_if_released()
        result = await self._farm.extract_chain(self, node, stream)
        await self.refresh()
        return result

    async def _extract_everywhere(self, stream: str | None) -> list[ExtractResult]:
        self.raise_if_released()
        nodes = taking_work(await self._farm.nodes())
        tasks = [asyncio.ensure_future(self._farm.extract_chain(self, node, stream)) for node in nodes]
        try:
            results = list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        await self.refresh()
        return results

    async def refresh(self) -> None:
        """Read anew which layers are present."""
        states = await self._farm.states([state.record.id for state in self._layers])
        self._layers = tuple(new or old for new, old in zip(states, self._layers, strict=True))

    def release(self) -> None:
        """Say that this object is not used any more; what it held goes with the driver's lease."""
        self._is_released = True

    def raise_if_released(self) -> None:
        """Raise RefReleasedError once it was released."""
        if self._is_released:
            raise RefReleasedError(self.id)
