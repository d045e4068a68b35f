"""Operations: awaited, looked at, left."""

from __future__ import annotations

import asyncio

import pytest

from cluster.progress import LayerPhase, ProgressItem
from lazyfarm.operation import Operation

FETCHING = ProgressItem(item="fetch:x", phase=LayerPhase.FETCHING, current_bytes=1, total_bytes=2)


class Streams:
    """The farm as an operation needs it: one progress stream that says one thing, and ends when told."""

    session_id = "s"

    def __init__(self):
        self.ended = asyncio.Event()

    async def follow(self, _stream):
        yield FETCHING
        await self.ended.wait()

    def end_stream(self, _stream):
        self.ended.set()


def operation_of(farm, result, *, gate=None):
    async def work(_stream):
        if gate is not None:
            await gate.wait()
        return result

    return Operation(farm, work, None)


async def test_who_has_seen_enough_still_gets_the_result():
    """Leaving the iterator early cancels nothing."""
    gate = asyncio.Event()
    operation = operation_of(Streams(), 7, gate=gate)
    async for item in operation.progress():
        assert item == FETCHING
        break
    gate.set()
    assert await operation == 7


async def test_an_item_that_did_not_end_is_ended_with_the_work():
    """Every item that was seen moving is seen to end."""
    items = [item async for item in operation_of(Streams(), 7).progress()]
    assert [item.phase for item in items] == [LayerPhase.FETCHING, LayerPhase.DONE]


async def test_cancelling_who_looks_on_cancels_the_work():
    """The iterator's task owns the work that it started."""
    operation = operation_of(Streams(), 7, gate=asyncio.Event())
    seen = asyncio.Event()

    async def look():
        async for _item in operation.progress():
            seen.set()

    task = asyncio.create_task(look())
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(asyncio.CancelledError):
        await operation
