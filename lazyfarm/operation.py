"""Operations: what a driver awaits, and may look at while it is under way."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from cluster.progress import LayerPhase, ProgressItem

T = TypeVar("T")

ProgressCallback = Callable[[ProgressItem], None]


class ProgressStreams(Protocol):
    """Where operations are followed: the farm."""

    @property
    def session_id(self) -> str:
        """Begins the name of every stream of this driver."""
        ...

    def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield a stream's items from its start to its end."""
        ...

    def end_stream(self, stream: str) -> None:
        """End a stream: whoever follows it stops."""
        ...


class Operation(Generic[T]):
    """Something that takes its time: ``await`` it for its result, or look on first.

    ::

        operation = ref.extract()
        async for item in operation.progress():
            print(item.item, item.current_bytes, item.total_bytes)
        extracted = await operation

    Starts when it is first awaited or looked at. Cancelling either cancels it; looking on no longer doesn't.
    """

    def __init__(
        self,
        farm: ProgressStreams,
        work: Callable[[str | None], Coroutine[Any, Any, T]],
        progress: ProgressCallback | None,
    ) -> None:
        self._farm = farm
        self._work = work
        self._callback = progress
        self._task: asyncio.Task[T] | None = None
        self._stream: str | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._result().__await__()

    async def _result(self) -> T:
        if self._callback is None:
            return await self._start()
        callback = self._callback
        async for item in self.progress():
            callback(item)
        return await self._start()

    def _start(self) -> asyncio.Task[T]:
        if self._task is None:
            self._task = asyncio.ensure_future(self._work(self._stream))
        return self._task

    async def progress(self) -> AsyncIterator[ProgressItem]:
        """Yield progress items until the operation has ended, however it ends."""
        if self._task is None:
            self._stream = f"{self._farm.session_id}-{secrets.token_hex(6)}"
        if self._stream is None:
            return  # started without a stream: too late to look on
        stream = self._stream
        task = self._start()
        task.add_done_callback(lambda _done: self._farm.end_stream(stream))
        moving: dict[str, ProgressItem] = {}
        try:
            async for item in self._farm.follow(stream):
                if item.phase.is_end:
                    moving.pop(item.item, None)
                else:
                    moving[item.item] = item
                yield item
            # Who does the work may have died, or hears only now that this call was cancelled.
            for item in moving.values():
                yield replace(item, phase=_end_of(task))
        except GeneratorExit:
            raise  # the onlooker has seen enough, and may still await the result
        except BaseException:
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
            raise


def _end_of(task: asyncio.Task[Any]) -> LayerPhase:
    """Return how an item ended that did not say so itself before the work was over."""
    if task.cancelled():
        return LayerPhase.CANCELLED
    return LayerPhase.DONE if task.exception() is None else LayerPhase.FAILED
