"""What every actor shell does with a call: payload in, payload out, nothing foreign in between."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from actors.replies import ERROR, RESULT, rpc
from cluster import tracing
from cluster.errors import ClusterError, InternalError
from cluster.messages import SessionInfo
from cluster.wire import decode, encode, encode_error

S = TypeVar("S")
Request = TypeVar("Request")

log = structlog.get_logger()


def answers(
    kind: str, request_type: type[Request]
) -> Callable[[Callable[[S, Request], Awaitable[object]]], Callable[[S, bytes], Awaitable[bytes]]]:
    """Turn a method on values into one on payloads.

    Errors travel as payloads too: an exception that leaves an async actor method is pickled by value,
    and ``SystemExit`` or ``KeyboardInterrupt`` would hang this call and all later ones. Only a
    cancellation is re-raised.
    """

    def wrap(method: Callable[[S, Request], Awaitable[object]]) -> Callable[[S, bytes], Awaitable[bytes]]:
        @functools.wraps(method)
        async def call(self: S, payload: bytes) -> bytes:
            try:
                request = decode(kind, request_type, payload)
                session: SessionInfo | None = getattr(request, "session", None)
                name, attributes = rpc(type(self).__name__, method.__name__)
                with tracing.continuing(name, session.traceparent if session is not None else "", attributes):
                    result = await method(self, request)
                return RESULT + encode(f"{kind}-result", result)
            except asyncio.CancelledError:
                raise
            except ClusterError as exc:
                return ERROR + encode_error(exc)
            except BaseException as exc:  # the last line of defence of the process
                log.exception("call.crashed", call=kind)
                return ERROR + encode_error(InternalError(f"{kind}: {type(exc).__name__}: {exc}"))

        return call

    return wrap
