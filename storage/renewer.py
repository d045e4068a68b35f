"""Renewal of flights from a thread of its own."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.config import RedisConfig
from cluster.errors import ClusterError
from cluster.faultpoints import FaultPoint, hit
from cluster.flight.values import Fence
from storage.connect import connect_sync
from storage.keys import Keys
from storage.protocol import Argument
from storage.sync_link import SyncLink

#: Renewals in one time to live, while the store answers and while it doesn't.
_RENEWALS = 3
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiter's record."""

    key: str
    worker: str


@dataclass(slots=True)
class _Kept:
    """What is renewed."""

    what: Fence | Waiting
    ttl_s: float
    on_lost: Callable[[], None] | None
    #: When the last renewal that succeeded was *sent*, monotonic: the store counts from later on.
    renewed_at: float
    #: Until its first renewal, which follows at once, by itself: what the join's answer took is not known here.
    is_new: bool = True

    @property
    def lost_at(self) -> float:
        """Return when it has to be given up unless it is renewed; a waiter's record never is."""
        return math.inf if self.on_lost is None else self.renewed_at + self.ttl_s


class RenewalStore(Protocol):
    """What a renewer asks to renew, from its thread."""

    def renew(self, kept: Sequence[tuple[Fence | Waiting, float]], timeout_s: float) -> list[bool]:
        """Renew each for its seconds, all at once, within *timeout_s*; tell for each whether it is still there.

        Raises:
            ClusterError: no answer.
        """
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


class ThreadFlightRenewer:
    """Implements :class:`cluster.ports.FlightRenewer` over any store.

    An ownership is lost when the store says so, or when its time to live has passed by this process's own
    monotonic clock since the last renewal that succeeded was sent. The store's count started later than
    that, so the owner is told before anybody may take over:

        t=0    renewal sent; the store receives it at t=0.1 and lets the owner live until t=6.1
        t=2    the network is cut; attempts at t=2, 2.6, 3.2 … get no answer
        t=6    on_lost: the owner stops
        t=6.1  the store lets somebody else own

    A waiter's record that is gone is nobody's concern: its process joins again.
    """

    def __init__(self, store: RenewalStore) -> None:
        self._store = store
        self._kept: dict[Fence | str, _Kept] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def keep(self, fence: Fence, *, ttl_s: float, on_lost: Callable[[], None]) -> None:
        """Renew an ownership until dropped: at once, and every third of its time to live."""
        self._add(fence, _Kept(fence, ttl_s, on_lost, time.monotonic()))

    def keep_waiting(self, key: str, *, worker: str, ttl_s: float) -> None:
        """Renew a waiter's record until dropped."""
        self._add(key, _Kept(Waiting(key, worker), ttl_s, None, time.monotonic()))

    def drop(self, fence: Fence) -> None:
        """Stop renewing an ownership; its *on_lost* is not called any more, unless it is being called now."""
        with self._changed:
            self._kept.pop(fence, None)

    def drop_waiting(self, key: str) -> None:
        """Stop renewing a waiter's record."""
        with self._changed:
            self._kept.pop(key, None)

    def close(self) -> None:
        """Stop the thread and wait for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _add(self, name: Fence | str, kept: _Kept) -> None:
        with self._changed:
            self._kept[name] = kept
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flight-renewer", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        attempted_at = -math.inf
        is_answered = True
        try:
            while True:
                with self._changed:
                    if self._is_closed:
                        return
                    now = time.monotonic()
                    round_at = self._round_at(attempted_at, is_answered=is_answered)
                    due = self._due(now, round_at, is_answered=is_answered)
                    if not due:
                        self._changed.wait(self._until_due(now, round_at))
                        continue
                is_answered = self._renew(due, now)
                if round_at <= now or not is_answered:
                    attempted_at = now
        finally:
            self._store.close()

    def _round_at(self, attempted_at: float, *, is_answered: bool) -> float:
        """Return when the next round is, which renews all; never while there is nothing to renew."""
        times = _RENEWALS if is_answered else _ATTEMPTS
        return attempted_at + min((kept.ttl_s for kept in self._kept.values()), default=math.inf) / times

    def _due(self, now: float, round_at: float, *, is_answered: bool) -> dict[Fence | str, _Kept]:
        """Return what is to be renewed, or given up, now: between rounds only what is new, or was not renewed in time.

        Else a process that begins to wait for fifty layers, one after another, would renew a thousand times.
        """
        if round_at <= now:
            return dict(self._kept)
        return {name: one for name, one in self._kept.items() if (is_answered and one.is_new) or one.lost_at <= now}

    def _until_due(self, now: float, round_at: float) -> float | None:
        """Return seconds until something is due; None while there is nothing to renew."""
        if not self._kept:
            return None
        return max(0.0, min(round_at, *(kept.lost_at for kept in self._kept.values())) - now)

    def _renew(self, kept: Mapping[Fence | str, _Kept], sent_at: float) -> bool:
        """Renew what is kept, and tell those that are lost; tell whether the store answered."""
        due = {name: one for name, one in kept.items() if one.lost_at > sent_at}
        answers: Sequence[bool | None] = [None] * len(due)
        if due:
            remaining_s = min(one.lost_at for one in due.values()) - sent_at
            timeout_s = min(remaining_s, *(one.ttl_s / _RENEWALS for one in due.values()))
            with contextlib.suppress(ClusterError):  # no answer: judged by the clock
                hit(FaultPoint.LEASE_RENEW_BEFORE)
                answers = self._store.renew([(one.what, one.ttl_s) for one in due.values()], timeout_s)
        lost = [name for name in kept if name not in due]
        now = time.monotonic()
        for (name, one), is_there in zip(due.items(), answers, strict=True):
            if is_there is not None:
                one.is_new = False
            if is_there:
                one.renewed_at = sent_at
            if is_there is False or one.lost_at <= now:
                lost.append(name)
        for name in lost:
            self._lose(name, kept[name])
        return None not in answers

    def _lose(self, name: Fence | str, kept: _Kept) -> None:
        with self._changed:
            if self._kept.get(name) is not kept:
                return  # dropped meanwhile, or kept anew
            del self._kept[name]
        if kept.on_lost is not None:
            kept.on_lost()


class RedisFlightRenewer(ThreadFlightRenewer):
    """Renews in Redis, all in one pipeline, over a connection of its own."""

    def __init__(self, config: RedisConfig, keys: Keys) -> None:
        super().__init__(_RedisRenewals(connect_sync(config), keys))


class _RedisRenewals:
    """Renewals as script calls."""

    def __init__(self, link: SyncLink, keys: Keys) -> None:
        self._link = link
        self._prefix = keys.prefix

    def renew(self, kept: Sequence[tuple[Fence | Waiting, float]], timeout_s: float) -> list[bool]:
        calls = [self._call(what, round(ttl_s * 1000)) for what, ttl_s in kept]
        return [bool(reply) for reply in self._link.run_many(calls, may_repeat=True, timeout_s=timeout_s)]

    def close(self) -> None:
        self._link.close()

    def _call(self, what: Fence | Waiting, ttl_ms: int) -> tuple[str, tuple[Argument, ...]]:
        match what:
            case Fence(key=key, epoch=epoch, number=number, token=token):
                return "flight_renew", (self._prefix, key, epoch, number, token, ttl_ms)
            case Waiting(key=key, worker=worker):
                return "flight_wait", (self._prefix, key, worker, ttl_ms)
