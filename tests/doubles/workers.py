"""Doubles around a scheduler: the workers of its nodes as handles in memory, and who is there."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from actors.placement import Placement
from actors.workers import Workers
from cluster.digest import digest_of
from cluster.errors import UnavailableError
from cluster.graph import Vertex
from cluster.job import JobId
from cluster.messages import ExportCacheResult, ExtractResult, NodeRecord, SessionQuestion
from cluster.op_messages import ContentKeyResult, RunOpResult
from cluster.solver.values import HoldId
from storage.memory_solver import MemoryPresence, SolverMemory
from tests.doubles.stores import FakeClock


class FakePresence(MemoryPresence):
    """Who is there: nodes by name, alive unless a test says otherwise."""

    def __init__(self, *nodes):
        super().__init__(SolverMemory(FakeClock()))
        self.alive = dict.fromkeys(nodes, True)

    async def nodes(self):
        await asyncio.sleep(0)  # as an answer of a store, it comes when others have had their turn
        await self.announce_nodes([NodeRecord(id=n, ray_id=n, address=n, alive=a) for n, a in self.alive.items()])
        return await super().nodes()


class FakeServer:
    """An actor that asks the sessions that attend it, when a test says so."""

    def __init__(self, name="server"):
        self.name = name
        self.questions = defaultdict(asyncio.Queue)
        self.answers = asyncio.Queue()
        #: Raised by coming polls, in order.
        self.poll_errors = []

    async def poll_questions(self, session_id, wait_s):
        if self.poll_errors:
            raise self.poll_errors.pop(0)
        return [await self.questions[session_id].get()]

    def send_answer(self, session_id, answer):
        self.answers.put_nowait((session_id, answer))

    def put(self, session_id, **what):
        """Put a question to a session."""
        defaults = {"registry": "", "plain_http": False, "scopes": (), "challenge": None, "was_refused": False}
        self.questions[session_id].put_nowait(SessionQuestion(question_id="1", **(defaults | what)))

    async def ask(self, session_id, **what):
        """Put a question to a session and return the first answer that comes."""
        self.put(session_id, **what)
        return (await self.answers.get())[1]


class Scripted(FakeServer):
    """A worker that notes its calls and does what a test says: returns, raises or calls what is planned for each."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        #: By method: what comes of coming calls, in order; the last one of all that follow.
        self.plans = {}

    def plan(self, method, *outcomes):
        self.plans[method] = list(outcomes)

    def requests(self, method):
        return [request for called, request in self.calls if called == method]

    async def _do(self, method, request, default):
        self.calls.append((method, request))
        plan = self.plans.get(method, [])
        outcome = default if not plan else plan[0] if len(plan) == 1 else plan.pop(0)
        if callable(outcome):
            outcome = await outcome(request)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class FakeFetchWorker(Scripted):
    """A node's fetch worker: what it is asked for is there, unless a test says otherwise."""

    async def resolve_image(self, request, *, timeout_s):
        return await self._do("resolve_image", request, UnavailableError("registry", "nothing is planned"))

    async def extract(self, request, *, timeout_s):
        result = ExtractResult(ref_id=request.ref_id, node=self.name, path="", seconds=0.0, layers=())
        return await self._do("extract", request, result) or result

    async def import_cache(self, request, *, timeout_s):
        return await self._do("import_cache", request, UnavailableError("cache", "nothing is planned"))

    async def export_cache(self, request, *, timeout_s):
        digest = digest_of(request.target.name.encode())
        return await self._do("export_cache", request, ExportCacheResult(target=request.target.name, digest=digest))


class FakeOpWorker(Scripted):
    """A node's op worker: every op comes to an empty filesystem, unless a test says otherwise."""

    async def run_op(self, request, *, timeout_s):
        return await self._do("run_op", request, RunOpResult(ref=None))

    async def watch_op(self, request, *, timeout_s):
        return await self._do("watch_op", request, True)

    async def content_key(self, request, *, timeout_s):
        return await self._do("content_key", request, ContentKeyResult(digest=digest_of(request.vertex)))


class FakeWorkers(Workers):
    """Workers of nodes, each one made when it is first asked for."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement, farm="test", version="1")
        self.fetchers = {}
        self.performers = {}

    def fetch_worker(self, node):
        return self.fetchers.setdefault(node, FakeFetchWorker(node))

    def op_worker(self, node):
        return self.performers.setdefault(node, FakeOpWorker(node))

    def calls(self, method):
        """Return all requests of a method, as (node, request)."""
        workers = [*self.fetchers.items(), *self.performers.items()]
        return [(node, request) for node, worker in workers for request in worker.requests(method)]


@dataclass
class FakeUse:
    """A :class:`cluster.solver.ports.VertexUse`."""

    vertex: Vertex
    jobs: tuple[JobId, ...] = (JobId("j1"),)
    hold: HoldId = 1
    #: What happened, in order, as tests put together.
    story: list = field(default_factory=list)

    @property
    def job(self):
        return JobId("j1")

    def beneficiaries(self):
        return self.jobs

    def began(self, node=""):
        self.story.append("began")
        self.node = node
