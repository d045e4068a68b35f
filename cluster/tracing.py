"""Traces: what a job or a call takes, span by span, across processes; told where the thing happens.

Code says ``with tracing.span("unpack"):``. Like metrics that does nothing until the process has a :class:`Tracer`
(:mod:`actors.traces` installs one where ``[tracing]`` names an endpoint), and nothing either for work that belongs to
no trace: only what people begin is one (:func:`beginning`). What is *decided* tells nothing: shells, adapters and
runners do.

The current span is a context variable's: tasks inherit it, threads of a pool don't (:func:`carried`). Between processes
it goes as W3C Trace Context's ``traceparent`` (https://www.w3.org/TR/trace-context/), in
:attr:`cluster.messages.SessionInfo.traceparent`. Names and attributes are OpenTelemetry's semantic conventions where
there are such, else begin with ``lazyfarm.``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar, Token
from enum import Enum
from types import TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Attribute = str | int | float | bool
Attributes = Mapping[str, Attribute]

#: The digest of the blob, vertex or chain that a span is about, and the job.
BLOB, VERTEX, CHAIN, JOB, NODE = (
    f"lazyfarm.{what}" for what in ("blob.digest", "vertex.digest", "chain.digest", "job.id", "node")
)


class SpanKind(Enum):
    """What a span is in a conversation; OpenTelemetry's words."""

    INTERNAL = "internal"
    CLIENT = "client"
    SERVER = "server"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class Span(Protocol):
    """One piece of work, from its start to its end. Any thread may call; nothing blocks or raises."""

    @property
    def traceparent(self) -> str:
        """Return what names this span to other processes; "" for none."""
        ...

    def put(self, attributes: Attributes) -> None:
        """Add attributes, or replace them."""
        ...

    def link(self, traceparent: str) -> None:
        """Say that the work was done, or begun, under another span; does nothing with ""."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """End it, once; *error*: it failed, or was cancelled."""
        ...


class Tracer(Protocol):
    """Makes spans, and sees to it that they are sent. Must neither block nor raise."""

    def start(self, name: str, *, parent: Span | str, kind: SpanKind, attributes: Attributes) -> Span:
        """Start a span under *parent*: one of this process, or a ``traceparent``; "": it begins a trace."""
        ...

    def flush(self) -> None:
        """Send what has ended, as the process does: for a moment only, and once."""
        ...


class _Nothing:
    """The span of what is not traced."""

    traceparent = ""

    def put(self, attributes: Attributes) -> None:
        pass

    def link(self, traceparent: str) -> None:
        pass

    def end(self, error: BaseException | None = None) -> None:
        pass


NOTHING: Span = _Nothing()

_tracer: Tracer | None = None
_current: ContextVar[Span] = ContextVar("lazyfarm_span", default=NOTHING)


def install(tracer: Tracer | None) -> None:
    """Have all spans of this process made by *tracer*; None: none are made any more."""
    global _tracer  # noqa: PLW0603 - one a process, as of metrics
    _tracer = tracer


def is_installed() -> bool:
    """Tell whether this process makes spans."""
    return _tracer is not None


def flush() -> None:
    """Send what this process's work has come to, before it ends."""
    if _tracer is not None:
        _tracer.flush()


def current() -> Span:
    """Return the span that this task or thread works under."""
    return _current.get()


def start(name: str, parent: Span, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL) -> Span:
    """Start a span under *parent*, to be ended by hand; nothing where that is nothing."""
    if _tracer is None or parent is NOTHING:
        return NOTHING
    return _tracer.start(name, parent=parent, kind=kind, attributes=attributes or {})


def span(name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL) -> Scope:
    """Work under a span of its own for the body, which ends with it; nothing where nothing is traced here."""
    return Scope(start(name, _current.get(), attributes, kind=kind), is_ended=True)


def beginning(
    name: str, attributes: Attributes | None = None, *, parent: str = "", kind: SpanKind = SpanKind.INTERNAL
) -> Scope:
    """As :func:`span`, but begin a trace, or go on with *parent*'s, where nothing is traced here yet."""
    here = _current.get()
    if _tracer is None:
        return Scope(NOTHING, is_ended=True)
    above = parent if here is NOTHING else here
    return Scope(_tracer.start(name, parent=above, kind=kind, attributes=attributes or {}), is_ended=True)


def continuing(
    name: str, traceparent: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.SERVER
) -> Scope:
    """Go on, for the body, with what another process has told of; nothing where it told of none."""
    if _tracer is None or not traceparent:
        return Scope(NOTHING, is_ended=True)
    return Scope(_tracer.start(name, parent=traceparent, kind=kind, attributes=attributes or {}), is_ended=True)


def within(parent: Span) -> Scope:
    """Work under a span that goes on after the body."""
    return Scope(parent, is_ended=False)


def carried(work: Callable[P, T]) -> Callable[P, T]:
    """Return *work* as a part of the current span, whichever thread runs it."""
    here = _current.get()
    if here is NOTHING:
        return work

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with within(here):
            return work(*args, **kwargs)

    return run


def begins(
    name: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Make a coroutine function one whose calls are spans, each of which may begin a trace."""

    def wrap(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with beginning(name):
                return await function(*args, **kwargs)

        return call

    return wrap


class Scope:
    """A span as the current one, for a ``with`` body."""

    __slots__ = ("_is_ended", "_span", "_token")

    def __init__(self, span: Span, *, is_ended: bool) -> None:
        self._span = span
        self._is_ended = is_ended
        self._token: Token[Span] | None = None

    def __enter__(self) -> Span:
        self._token = _current.set(self._span)
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
        if self._is_ended:
            self._span.end(error)
