"""From a thread that reads to an event loop that sends, in bounded memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from cluster.ports import ByteStream

_CHUNK_BYTES = 512 * 1024
#: Chunks that are read ahead; at most one more is being read and one being sent.
_AHEAD = 3
_STOP_TIMEOUT_S = 5.0


class StreamPump:
    """Reads a :class:`ByteStream` in a thread of its own and yields its bytes on the event loop.

    An asynchronous context manager. On leaving it the thread is told to stop and is waited for, but not
    for longer than a few seconds: a thread that is stuck in a read ends with that read's own deadline.
    """

    def __init__(self, open_stream: Callable[[], AbstractContextManager[ByteStream]]) -> None:
        self._open_stream = open_stream
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="upload-pump", daemon=True)
        #: What the stream raised; None while it has raised nothing.
        self.error: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._room.release()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._ended.wait()
        except TimeoutError:
            pass

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the stream's bytes in order; raise what the stream raised."""
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, BaseException):
                self.error = chunk
                raise chunk
            yield chunk
            self._room.release()

    def _run(self) -> None:
        try:
            with self._open_stream() as stream:
                while self._room.acquire() and not self._stopped.is_set():
                    chunk = bytearray(_CHUNK_BYTES)
                    filled = _fill(stream, memoryview(chunk))
                    if filled:
                        del chunk[filled:]
                        self._post(chunk)
                    if filled < _CHUNK_BYTES:
                        break
        except BaseException as exc:  # noqa: BLE001 -- it is raised again, where the bytes are awaited
            self._post(exc)
        finally:
            self._post(None)
            self._call(self._ended.set)

    def _post(self, item: bytes | bytearray | BaseException | None) -> None:
        self._call(self._chunks.put_nowait, item)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            self._stopped.set()


def _fill(stream: ByteStream, buffer: memoryview) -> int:
    filled = 0
    while filled < len(buffer):
        count = stream.readinto(buffer[filled:])
        if count == 0:
            break
        filled += count
    return filled
