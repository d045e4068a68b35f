"""Typed faces of remote actors: the only file that says ``.remote(``.

Every call has a deadline, because over a silent partition a Ray call never returns; cancelling the
waiting task cancels the remote work too. Ray's errors become ours here. Ray itself is imported by who calls: a driver
outside the cluster has none.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from actors.options import namespace
from actors.replies import rpc, unwrap
from cluster import tracing
from cluster.collect.verify import Verified
from cluster.errors import ActorLostError, DeadlineExceededError, UnavailableError, WorkerBusyError
from cluster.fetch.retry import RetryPolicy
from cluster.messages import (
    AssembleRequest,
    ExportCacheRequest,
    ExportCacheResult,
    ExtractRequest,
    ExtractResult,
    GetByBlobRequest,
    GetRequest,
    ImportCacheRequest,
    ImportCacheResult,
    NodePruneRequest,
    NodePruneResult,
    NodeUsageRequest,
    NodeUsageResult,
    PullRequest,
    PullResult,
    PushRequest,
    PushResult,
    RefsResult,
    ResolveRequest,
    ResolveResult,
    SessionAnswer,
    SessionInfo,
    SessionQuestion,
    UnlazyRequest,
    UnlazyResult,
    VerifyRequest,
)
from cluster.op_messages import ContentKeyRequest, ContentKeyResult, RunOpRequest, RunOpResult, WatchOpRequest
from cluster.ref import ImageRecord
from cluster.topology import op_worker_name, scheduler_name, shard_name, worker_name
from cluster.tracing import Span, SpanKind
from cluster.wire import encode

#: Seconds that a poll may take beyond those it waits there: one that was sent to an actor as it died, and is held by
#: Ray until the actor is back, must be given up before the actor takes the silent session for gone.
_POLL_SLACK_S = 3.0
#: Calls of one tenant that a process has sent at once to one fetch worker; its share there may be less.
_CALLS = 128
#: How a call is made again that a worker has no room for.
_BUSY = RetryPolicy(attempts=sys.maxsize, budget_s=math.inf, base_s=0.5, cap_s=20.0)


class ActorHandle:
    """A named actor; looked up at first use and again after it was lost."""

    def __init__(self, name: str, *, farm: str) -> None:
        self.name = name
        self._namespace = namespace(farm)
        self._actor: Any = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def resolve(self) -> Any:
        """Return Ray's own handle.

        Raises:
            ActorLostError: no such actor is there at the moment.
        """
        if self._actor is None:
            import ray  # noqa: PLC0415 - see the module

            try:
                self._actor = ray.get_actor(self.name, namespace=self._namespace)
            except ValueError as exc:
                raise ActorLostError(f"actor {self.name}", "it is not running") from exc
        return self._actor

    async def call(self, method: str, kind: str, request: object, result_type: type[Any], timeout_s: float) -> Any:
        """Call *method* with an encoded *request* and return the decoded result."""
        name, attributes = rpc(type(self).__name__.removesuffix("Handle"), method)
        with tracing.span(name, attributes | {"lazyfarm.actor": self.name}, kind=SpanKind.CLIENT) as span:
            reply = await self.call_raw(method, encode(kind, _traced(request, span)), timeout_s=timeout_s)
            return unwrap(kind, result_type, reply)

    async def call_raw(self, method: str, *args: object, timeout_s: float) -> Any:
        """Call *method* with plain arguments.

        Raises:
            ActorLostError: the actor or its node is lost; the outcome is unknown.
            DeadlineExceededError: no answer in time; the remote work is cancelled, if it can be reached.
        """
        actor = await asyncio.to_thread(self.resolve) if self._actor is None else self._actor
        import ray.exceptions  # noqa: PLC0415 - see the module

        reference = getattr(actor, method).remote(*args)
        try:
            async with asyncio.timeout(timeout_s):
                return await reference
        except TimeoutError as exc:
            ray.cancel(reference)
            raise DeadlineExceededError(f"{self.name}.{method}", f"no answer in {timeout_s:.0f} s") from exc
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except ray.exceptions.TaskCancelledError as exc:
            raise UnavailableError(f"{self.name}.{method}", "the call was cancelled there") from exc
        except ray.exceptions.RayError as exc:
            self._actor = None
            raise ActorLostError(f"actor {self.name}", _summary(exc)) from exc


def _traced(request: Any, span: Span) -> object:
    """Return *request* with the span that it is made under, where its session can say so."""
    session: SessionInfo | None = getattr(request, "session", None)
    if session is None or not (traceparent := span.traceparent):
        return request
    return replace(request, session=replace(session, traceparent=traceparent))


def _summary(exc: BaseException) -> str:
    """Return the first telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else ''}"


class SessionServerHandle(ActorHandle):
    """What every actor offers to the drivers whose calls it runs."""

    async def poll_questions(self, session_id: str, wait_s: float) -> list[SessionQuestion]:
        """Wait up to *wait_s* seconds for questions; the driver's session keeps one such call open."""
        reply = await self.call_raw("session_next", session_id, wait_s, timeout_s=wait_s + _POLL_SLACK_S)
        questions: list[SessionQuestion] = unwrap("session-next", list[SessionQuestion], reply)
        return questions

    def send_answer(self, session_id: str, answer: SessionAnswer) -> None:
        """Send an answer and don't wait: the asker has a deadline of its own."""
        self.resolve().session_answer.remote(session_id, encode("session-answer", answer))


class FetchWorkerHandle(SessionServerHandle):
    """The fetch worker of one node.

    A call that it has no room for is made again, with growing pauses, until its deadline. No more than some of each
    tenant are sent at once: the others wait here, where they cost the worker nothing. Calls belong to one event loop.
    """

    def __init__(self, name: str, *, farm: str) -> None:
        super().__init__(name, farm=farm)
        #: Of each tenant that has calls here.
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @classmethod
    def of_node(cls, node: str, *, farm: str, version: str) -> FetchWorkerHandle:
        """Return the handle of a node's worker."""
        return cls(worker_name(node, version), farm=farm)

    async def call(self, method: str, kind: str, request: Any, result_type: type[Any], timeout_s: float) -> Any:
        """Call *method* for the session in *request*, again while the worker is busy.

        A request of no session is the farm's own work, which waits for no tenant's turn.

        Raises:
            WorkerBusyError: it was busy all the time.
            DeadlineExceededError: no answer in time, or no turn; and as :meth:`ActorHandle.call_raw`.
        """
        session: SessionInfo | None = getattr(request, "session", None)
        if session is None:
            return await super().call(method, kind, request, result_type, timeout_s)
        until_s = time.monotonic() + timeout_s
        slots = self._slots.setdefault(session.tenant, asyncio.Semaphore(_CALLS))
        try:
            async with asyncio.timeout(timeout_s):
                await slots.acquire()
        except TimeoutError as exc:
            raise DeadlineExceededError(f"{self.name}.{method}", f"no turn in {timeout_s:.0f} s") from exc
        try:
            attempt = 0
            while True:
                attempt += 1
                left_s = until_s - time.monotonic()
                try:
                    return await super().call(method, kind, request, result_type, max(0.0, left_s))
                except WorkerBusyError as exc:
                    # Jitter, so that those who were refused don't come back together; not a matter of security.
                    pause_s = _BUSY.next_delay_s(exc, attempt, timeout_s - left_s, random.random())  # noqa: S311
                    if pause_s is None or time.monotonic() + pause_s > until_s:
                        raise
                    await asyncio.sleep(pause_s)
        finally:
            slots.release()

    async def resolve_image(self, request: ResolveRequest, *, timeout_s: float) -> ResolveResult:
        """Read an image's manifest and config, without making refs of it."""
        result: ResolveResult = await self.call("resolve_image", "resolve", request, ResolveResult, timeout_s)
        return result

    async def pull(self, request: PullRequest, *, timeout_s: float) -> PullResult:
        """Resolve an image and make refs of it."""
        result: PullResult = await self.call("pull", "pull", request, PullResult, timeout_s)
        return result

    async def assemble(self, request: AssembleRequest, *, timeout_s: float) -> ImageRecord:
        """Make an image of a chain and a config."""
        result: ImageRecord = await self.call("assemble", "assemble", request, ImageRecord, timeout_s)
        return result

    async def unlazy(self, request: UnlazyRequest, *, timeout_s: float) -> UnlazyResult:
        """Make a chain's blobs present."""
        result: UnlazyResult = await self.call("unlazy", "unlazy", request, UnlazyResult, timeout_s)
        return result

    async def extract(self, request: ExtractRequest, *, timeout_s: float) -> ExtractResult:
        """Mount a chain on that node."""
        result: ExtractResult = await self.call("extract", "extract", request, ExtractResult, timeout_s)
        return result

    async def node_usage(self, request: NodeUsageRequest, *, timeout_s: float) -> NodeUsageResult:
        """Tell what lies on that node's disk."""
        result: NodeUsageResult = await self.call("node_usage", "node-du", request, NodeUsageResult, timeout_s)
        return result

    async def prune_node(self, request: NodePruneRequest, *, timeout_s: float) -> NodePruneResult:
        """Remove from that node's disk what nothing needs."""
        result: NodePruneResult = await self.call("prune_node", "node-prune", request, NodePruneResult, timeout_s)
        return result

    async def push(self, request: PushRequest, *, timeout_s: float) -> PushResult:
        """Push an image."""
        result: PushResult = await self.call("push", "push", request, PushResult, timeout_s)
        return result

    async def verify(self, request: VerifyRequest, *, timeout_s: float) -> Verified:
        """Verify present blobs, or that node's copies."""
        result: Verified = await self.call("verify", "verify", request, Verified, timeout_s)
        return result

    async def export_cache(self, request: ExportCacheRequest, *, timeout_s: float) -> ExportCacheResult:
        """Export results to a remote cache."""
        result: ExportCacheResult = await self.call(
            "export_cache", "export-cache", request, ExportCacheResult, timeout_s
        )
        return result

    async def import_cache(self, request: ImportCacheRequest, *, timeout_s: float) -> ImportCacheResult:
        """Read what a remote cache holds."""
        result: ImportCacheResult = await self.call(
            "import_cache", "import-cache", request, ImportCacheResult, timeout_s
        )
        return result


class CacheShardHandle(SessionServerHandle):
    """One cache-manager shard."""

    @classmethod
    def of_index(cls, index: int, *, farm: str, version: str) -> CacheShardHandle:
        """Return the handle of a shard."""
        return cls(shard_name(index, version), farm=farm)

    async def get_by_blob(self, request: GetByBlobRequest, *, timeout_s: float) -> RefsResult:
        """Make or find refs for descriptors."""
        result: RefsResult = await self.call("get_by_blob", "get-by-blob", request, RefsResult, timeout_s)
        return result

    async def get(self, request: GetRequest, *, timeout_s: float) -> RefsResult:
        """Look a ref up."""
        result: RefsResult = await self.call("get", "get", request, RefsResult, timeout_s)
        return result


class OpWorkerHandle(SessionServerHandle):
    """The op worker of one node."""

    @classmethod
    def of_node(cls, node: str, *, farm: str, version: str) -> OpWorkerHandle:
        """Return the handle of a node's op worker."""
        return cls(op_worker_name(node, version), farm=farm)

    async def run_op(self, request: RunOpRequest, *, timeout_s: float) -> RunOpResult:
        """Carry an op out."""
        result: RunOpResult = await self.call("run_op", "run-op", request, RunOpResult, timeout_s)
        return result

    async def watch_op(self, request: WatchOpRequest, *, timeout_s: float) -> bool:
        """Tell a further job what an op says."""
        result: bool = await self.call("watch_op", "watch-op", request, bool, timeout_s)
        return result

    async def content_key(self, request: ContentKeyRequest, *, timeout_s: float) -> ContentKeyResult:
        """Digest what an op uses of an input."""
        result: ContentKeyResult = await self.call("content_key", "content-key", request, ContentKeyResult, timeout_s)
        return result


class SchedulerHandle(SessionServerHandle):
    """One solver scheduler."""

    @classmethod
    def of_index(cls, index: int, *, farm: str, version: str) -> SchedulerHandle:
        """Return the handle of a scheduler by number."""
        return cls(scheduler_name(index, version), farm=farm)

    async def look_for_jobs(self, *, timeout_s: float) -> None:
        """Have it look now for jobs that nobody has; it does so by itself every second."""
        await self.call_raw("look_for_jobs", timeout_s=timeout_s)
