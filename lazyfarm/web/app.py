"""The page: what is under which address, and how it is shown."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from cluster.audit import AuditEntry, Operation
from cluster.collect.stock import ImageUse, RefUse
from cluster.digest import Digest
from cluster.errors import AmbiguousJobError, ClusterError, JobNotFoundError
from cluster.job import JobEvent, JobId, JobState
from cluster.lease import blob_resource
from cluster.ref import RefId
from cluster.traffic import Traffic
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.job_progress import describe
from lazyfarm.cli.job_view import LogLine, at, read_error
from lazyfarm.cli.terminal import visible
from lazyfarm.web import graph, plot
from lazyfarm.web.guard import Guard
from lazyfarm.web.job import LOG_LINES, JobStory, ShownVertex
from lazyfarm.web.reading import TRAIL, FarmReader, Stocked

#: Rows of a list that are shown at once.
ROWS = 50
#: Seconds between two looks of a page that stays open, where things move and where they seldom do.
_LIVE_S = 2
_SLOW_S = 5
#: Seconds between two messages of a job's stream, at least; and at most, while something is busy: clocks tick.
_GATHER_S = 0.3
_TICK_S = 1.0
#: Of a number in an address, at most.
_DIGITS = 12
#: Windows of the plot: words and seconds.
_WINDOWS = {"6h": 6 * 3600.0, "24h": 86400.0, "7d": 7 * 86400.0}

_PAGES = (
    ("/", "Farm"),
    ("/jobs", "Jobs"),
    ("/images", "Images"),
    ("/refs", "Refs"),
    ("/blobs", "Blobs"),
    ("/leases", "Leases"),
    ("/flights", "Flights"),
    ("/registries", "Registries"),
    ("/avoided", "Avoided"),
    ("/audit", "Audit"),
)
_REF_STATES = ("lazy", "present", "held", "unheld", "shared")
_BLOB_STATES = ("present", "lazy", "layer", "manifest", "config", "unheld")
_IMAGE_STATES = ("lazy", "present", "held", "unheld")

T = TypeVar("T")


def build_app(reader: FarmReader, *, token: str, cookie: str) -> Guard:
    """Return the page of one farm, for whoever has *token*."""
    return Guard(_Pages(reader).app(), token=token, cookie=cookie)


class _Pages:
    """Every address of the page."""

    def __init__(self, reader: FarmReader) -> None:
        self._reader = reader
        self._templates = Environment(
            loader=PackageLoader("lazyfarm.web"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "at": at, "count": count, "describe": describe, "duration": duration, "error": read_error, "short": short,
            "size": size, "visible": visible, "when": _when, "moment": _moment,
        }  # fmt: skip
        self._templates.globals |= {
            "farm": reader.settings.config.farm.name, "pages": _PAGES, "graph": graph,
            "plot_size": (plot.WIDTH, plot.HEIGHT), "joined_height": plot.JOINED_HEIGHT,
        }  # fmt: skip

    def app(self) -> Starlette:
        """Return the application."""
        shown: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._farm,
            "/jobs": self._jobs,
            "/jobs/{job}": self._job,
            "/jobs/{job}/{vertex}": self._vertex,
            "/refs": self._refs,
            "/refs/{ref}": self._ref,
            "/images": self._images,
            "/blobs": self._blobs,
            "/blobs/{blob}": self._blob,
            "/leases": self._leases,
            "/leases/{lease:path}": self._lease,
            "/audit": self._audit,
            "/flights": self._flights,
            "/registries": self._registries,
            "/avoided": self._avoided,
        }
        routes = [
            Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
            Route("/jobs/{job}/events", self._events),
            *(Route(path, page) for path, page in shown.items()),
        ]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self._reader.aclose()

        return Starlette(
            routes=routes,
            lifespan=lifespan,
            exception_handlers={ClusterError: self._failed, 404: self._not_found},  # type: ignore[dict-item]  # they take what they are for
        )

    # -- pages ------------------------------------------------------------------------------------------------

    async def _farm(self, request: Request) -> Response:
        now = await self._reader.farm()
        wanted = _Filter.of(request)
        nodes = wanted.among(now.nodes, lambda one: (one.record.id, one.record.address, one.record.state))
        actors = wanted.among(now.actors, lambda one: (one.name, one.kind, one.node, one.state))
        return self._shown(
            request,
            "farm.html",
            "Farm",
            every_s=_LIVE_S,
            now=now,
            nodes=_Rows(nodes, request, "nodes"),
            actors=_Rows(actors, request, "actors"),
            choices=(),
        )

    async def _refs(self, request: Request) -> Response:
        stocked = await self._reader.stocked()
        wanted = _Filter.of(request)
        found = wanted.among(
            stocked.refs.values(), lambda use: _said_of_ref(use, stocked), lambda use: _ref_states(use, stocked)
        )
        rows = _Rows(found, request)
        states = {use.id: stocked.stock.states[use.id] for use in rows.shown}
        return self._shown(request, "refs.html", "Refs", every_s=_SLOW_S, rows=rows, states=states, choices=_REF_STATES)

    async def _ref(self, request: Request) -> Response:
        now = await self._reader.ref(RefId(request.path_params["ref"]))
        if now is None:
            name = request.path_params["ref"]
            return self._missing(request, f"There is no ref {name}: it was collected, or never was.")
        trail = [entry for entry in await self._reader.trail() if entry.ref == now.use.id]
        return self._shown(
            request, "ref.html", f"Ref {short(now.use.id)}", every_s=_SLOW_S, now=now, trail=trail[:ROWS], most=ROWS
        )

    async def _images(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        found = wanted.among(await self._reader.images(), lambda use: (use.name,), _image_states)
        return self._list(request, "images.html", "Images", found, every_s=_SLOW_S, choices=_IMAGE_STATES)

    async def _blobs(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        found = wanted.among(
            (await self._reader.blobs()).values(),
            lambda blob: (blob.digest, blob.source, *blob.images),
            lambda blob: (blob.state, blob.kind, "held" if blob.is_in_use else "unheld"),
        )
        return self._list(request, "blobs.html", "Blobs", found, every_s=_SLOW_S, choices=_BLOB_STATES)

    async def _blob(self, request: Request) -> Response:
        digest = request.path_params["blob"]
        blobs, flights, entries = await asyncio.gather(
            self._reader.blobs(), self._reader.flights(), self._reader.trail()
        )
        blob = blobs.get(digest)
        flight = next((one for one in flights if one.key == blob_resource(digest)), None)
        trail = [entry for entry in entries if entry.digest == digest]
        if blob is None and flight is None and not trail:
            return self._missing(request, f"There is no blob {digest}: it was collected, or never was.")
        return self._shown(
            request,
            "blob.html",
            f"Blob {short(digest)}",
            every_s=_LIVE_S,
            digest=digest,
            blob=blob,
            flight=flight,
            trail=trail[:ROWS],
            most=ROWS,
        )

    async def _leases(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        found = wanted.among(
            await self._reader.leases(),
            lambda lease: (lease.id, *lease.labels.keys(), *lease.labels.values(), *lease.resources),
            lambda lease: ("expires" if lease.expires_wall_s else "pinned",),
        )
        return self._list(request, "leases.html", "Leases", found, every_s=_SLOW_S, choices=("expires", "pinned"))

    async def _lease(self, request: Request) -> Response:
        name = request.path_params["lease"]
        lease = next((one for one in await self._reader.leases() if one.id == name), None)
        if lease is None:
            return self._missing(request, f"There is no lease {name}: it lapsed or was let go of, or never was.")
        wanted = _Filter.of(request)
        held = [one.partition(":")[::2] for one in wanted.among(lease.resources, lambda one: (one,))]
        return self._list(request, "lease.html", f"Lease {lease.id}", held, every_s=_SLOW_S, lease=lease)

    async def _audit(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        found = wanted.among(await self._reader.trail(), _said_of_entry, lambda entry: (entry.operation,))
        choices = tuple(Operation)
        return self._list(request, "audit.html", "Audit", found, choices=choices, choices_of="What", most=TRAIL)

    async def _flights(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        flights = wanted.among(await self._reader.flights(), lambda one: (one.key, one.owner), lambda one: (one.state,))
        return self._list(request, "flights.html", "Flights", flights, choices=("running", "stopping"))

    async def _registries(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        found = wanted.among(await self._reader.registries(), lambda one: (one.budget.host,), lambda one: (one.state,))
        return self._list(request, "registries.html", "Registries", found, choices=("ready", "reduced", "failed"))

    async def _avoided(self, request: Request) -> Response:
        window = request.query_params.get("window", "")
        window = window if window in _WINDOWS else "24h"
        (total, slots), stocked = await asyncio.gather(self._reader.traffic(_WINDOWS[window]), self._reader.stocked())
        wanted = _Filter.of(request)
        within = sum((traffic for _, traffic in slots), Traffic()).registries
        registries = {name: within[name] for name in sorted(within) if wanted.holds(name)}
        if wanted.words:  # the plot is of what is asked for
            slots = [(began, traffic.at(registries)) for began, traffic in slots]
        links = {name: f"/avoided?{urlencode({'window': name, 'q': wanted.words})}" for name in _WINDOWS}
        return self._shown(
            request,
            "avoided.html",
            "Avoided",
            every_s=_SLOW_S,
            total=total,
            lazy_bytes=stocked.usage.avoided_bytes,
            registries=registries,
            plot=plot.draw(slots),
            window=window,
            windows=links,
            words=wanted.words,
            choices=(),
            kept={"window": window},
        )

    async def _jobs(self, request: Request) -> Response:
        wanted = _Filter.of(request)
        found = [
            (record, targets)
            for record, targets in await self._reader.newest_jobs()
            if wanted.allows(record.state.value) and wanted.holds(record.id, *targets, *record.spec.labels.values())
        ]
        choices = tuple(one.value for one in JobState)
        return self._list(request, "jobs.html", "Jobs", found, choices=choices)

    # -- jobs -------------------------------------------------------------------------------------------------

    async def _job(self, request: Request) -> Response:
        now = await self._reader.job(request.path_params["job"])
        story = JobStory(now.definition)
        story.take(now.events)
        wall_s = time.time()
        wanted = _Filter.of(request)
        params = {"since": str(story.count), "q": wanted.words, "state": wanted.state}
        events = f"/jobs/{now.record.id}/events?{urlencode({name: text for name, text in params.items() if text})}"
        return self._shown(
            request,
            "job.html",
            f"Job {short(now.record.id)}",
            every_s=0,
            record=now.record,
            targets=now.targets,
            story=story,
            job=story.job(wall_s),
            vertices=story.vertices(wall_s),
            is_wanted=wanted.has_vertex,
            choices=("waiting", "running", "cached", "completed", "failed", "cancelled"),
            events="" if story.is_over else events,
        )

    async def _vertex(self, request: Request) -> Response:
        now = await self._reader.job(request.path_params["job"])
        watched = Digest(request.path_params["vertex"])
        story = JobStory(now.definition, watched)
        story.take(now.events)
        if watched not in story.view.vertices:
            return self._missing(request, f"Job {now.record.id} has no vertex {watched}.")
        shown = story.shown(watched, time.time())
        events = f"/jobs/{now.record.id}/events?{urlencode({'since': story.count, 'vertex': watched})}"
        below = (
            ()
            if now.definition is None or watched not in now.definition.vertices
            else tuple(dict.fromkeys(one for one in now.definition.vertices[watched].inputs if one))
        )
        return self._shown(
            request,
            "vertex.html",
            shown.label,
            every_s=0,
            record=now.record,
            story=story,
            vertex=shown,
            inputs=[story.shown(one, time.time()) for one in below],
            lines=LOG_LINES,
            events="" if story.is_over else events,
        )

    async def _events(self, request: Request) -> Response:
        """Stream what changes of a job: elements of its page, each in place of the one that has its ID."""
        record = await self._reader.jobs.find(request.path_params["job"])
        watched = request.query_params.get("vertex")
        definition = await self._reader.jobs.definition(record.id)
        story = JobStory(definition, None if watched is None else Digest(watched))
        told = self._told(record.id, story, _number(request, "since"), _Filter.of(request))
        return StreamingResponse(told, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _told(self, job: JobId, story: JobStory, since: int, wanted: _Filter) -> AsyncIterator[str]:
        # What was told before the page was made is gone through without a word. A browser that comes back after its
        # connection dropped asks for the same again, and gets all that it may have missed.
        is_first = True
        try:
            async with aclosing(_batches(self._reader.jobs.events(job))) as batches:
                async for batch in batches:
                    silent = max(0, min(len(batch), since - story.count))
                    story.take(batch[:silent])
                    if silent:
                        story.forget_changes()
                    said = story.take(batch[silent:])
                    if story.count < since:
                        continue
                    yield _message("change", self._changes(job, story, said, wanted, is_first=is_first))
                    is_first = False
        except ClusterError as exc:
            yield _message("change", self._render("gone.html", error=exc))
        yield _message("end", "")

    def _changes(self, job: JobId, story: JobStory, said: Sequence[LogLine], wanted: _Filter, *, is_first: bool) -> str:
        wall_s = time.time()
        return self._render(
            "changes.html",
            job_id=job,
            job=story.job(wall_s),
            vertices=story.changed(wall_s),
            watched=story.watched,
            log=story.log if is_first else said,
            is_first=is_first,
            is_wanted=wanted.has_vertex,
        )

    # -- how ---------------------------------------------------------------------------------------------------

    def _render(self, template: str, **values: object) -> str:
        return self._templates.get_template(template).render(**values)

    def _list(
        self,
        request: Request,
        template: str,
        title: str,
        found: Sequence[object],
        *,
        every_s: int = _LIVE_S,
        choices: tuple[str, ...] = (),
        **values: object,
    ) -> Response:
        """Answer with a part of a list, which has a filter; *choices* are the states that it has."""
        rows = _Rows(found, request)
        return self._shown(request, template, title, every_s=every_s, rows=rows, choices=choices, **values)

    def _shown(self, request: Request, template: str, title: str, *, every_s: int, **values: object) -> Response:
        """Answer with a page; or, to one that looks again, with what is new of it, or with nothing where nothing is."""
        params = [(name, value) for name, value in request.query_params.multi_items() if name != "have"]
        here = request.url.path + (f"?{urlencode(params)}" if params else "")
        inner = self._render(template, request=request, here=here, **values)
        have = hashlib.sha256(inner.encode()).hexdigest()[:16]
        if _is_part(request) and request.query_params.get("have") == have:
            return Response(status_code=204)
        look = f"{here}{'&' if params else '?'}have={have}"
        live = {"inner": inner, "look": look, "every_s": every_s}
        if _is_part(request):
            return HTMLResponse(self._render("live.html", **live))
        return HTMLResponse(
            self._render(
                "shell.html",
                title=title,
                request=request,
                choices=values.get("choices"),
                choices_of=values.get("choices_of", "State"),
                kept=values.get("kept", {}),
                **live,
            )
        )

    def _missing(self, request: Request, text: str, status: int = 404, hint: str = "") -> Response:
        live = {"inner": self._render("error.html", text=text, hint=hint), "look": str(request.url.path), "every_s": 0}
        if _is_part(request):
            # Shown as it is: htmx leaves the page as it was where it is told of an error. And it looks again.
            again = {**live, "look": request.url.path + "?" + str(request.url.query), "every_s": _LIVE_S}
            return HTMLResponse(self._render("live.html", **again))
        return HTMLResponse(
            self._render("shell.html", title="lazyfarm", request=request, choices=None, kept={}, **live), status
        )

    async def _not_found(self, request: Request, _: Exception) -> Response:
        return self._missing(request, f"There is nothing at {request.url.path}.")

    async def _failed(self, request: Request, exc: ClusterError) -> Response:
        status = 404 if isinstance(exc, JobNotFoundError | AmbiguousJobError) else 503
        return self._missing(request, str(exc), status, exc.hint)


@dataclass(frozen=True, slots=True)
class _Filter:
    """What of a list one request is for."""

    words: str
    #: "" for any.
    state: str

    @classmethod
    def of(cls, request: Request) -> _Filter:
        """Read a request's filter."""
        return cls(request.query_params.get("q", "").strip().lower(), request.query_params.get("state", ""))

    def holds(self, *texts: str) -> bool:
        """Tell whether every word is found in what is said of something, anywhere."""
        if not self.words:
            return True
        said = "\n".join(texts).lower()
        return all(word in said for word in self.words.split())

    def allows(self, state: str) -> bool:
        """Tell whether what is in that state is asked for."""
        return self.state in ("", state)

    def among(
        self,
        everything: Collection[T],
        said: Callable[[T], Iterable[str]],
        states: Callable[[T], Iterable[str]] = lambda _: (),
    ) -> Sequence[T]:
        """Return what is asked for: *said* of it are the words, and it is in those *states*. All, where nothing is."""
        if not (self.words or self.state):
            return tuple(everything)
        return [one for one in everything if (not self.state or self.state in states(one)) and self.holds(*said(one))]

    def has_vertex(self, vertex: ShownVertex) -> bool:
        """Tell whether a vertex is asked for."""
        return self.allows(vertex.state) and self.holds(vertex.label, vertex.digest, vertex.node)


class _Rows(Generic[T]):
    """The rows of a list that one request is shown."""

    def __init__(self, found: Sequence[T], request: Request, param: str = "page") -> None:
        self.total = len(found)
        self.pages = max(1, -(-len(found) // ROWS))
        self.page = min(max(_number(request, param), 1), self.pages)
        self.first = (self.page - 1) * ROWS
        self.shown = found[self.first : self.first + ROWS]
        self._request = request
        #: Of the address: which part of this list is shown.
        self.param = param

    def link(self, page: int) -> str:
        """Return the address of another part of the list."""
        params = self._request.query_params.items()
        kept = {name: value for name, value in params if name not in ("have", self.param) and value}
        return f"{self._request.url.path}?{urlencode({**kept, self.param: page})}"


async def _batches(events: AsyncIterator[JobEvent]) -> AsyncGenerator[list[JobEvent]]:
    """Yield events gathered over a short while; nothing, now and then, where none come. Raises what they raise."""
    told: list[JobEvent] = []  # no longer than a job's stream may be
    news = asyncio.Event()

    async def read() -> None:
        try:
            async for event in events:
                told.append(event)
                news.set()
        finally:
            news.set()

    reading = asyncio.create_task(read())
    try:
        while told or not reading.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await news.wait()
            await asyncio.sleep(_GATHER_S)
            news.clear()
            batch, told[:] = told[:], []
            yield batch
        reading.result()
    finally:
        reading.cancel()
        await asyncio.wait({reading})


def _message(event: str, data: str) -> str:
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {event}\n{lines}\n"


def _number(request: Request, name: str) -> int:
    """Return a number of a request's address; 0 for what is none, or none that anything here could be."""
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else 0


def _is_part(request: Request) -> bool:
    """Tell whether a page that is open asks for what is new of it."""
    return request.headers.get("hx-request") == "true"


def _ref_states(use: RefUse, stocked: Stocked) -> Iterable[str]:
    shared = ("shared",) if use.is_shared else ()
    return (
        "lazy" if stocked.stock.states[use.id].is_lazy else "present",
        "held" if use.is_in_use else "unheld",
        *shared,
    )


def _said_of_ref(use: RefUse, stocked: Stocked) -> Iterable[str]:
    state = stocked.stock.states[use.id]
    return (
        use.id,
        state.record.parent or "",
        use.digest,
        use.description,
        *state.record.image_refs,
        *(one.source for one in state.providers),
    )


def _image_states(use: ImageUse) -> Iterable[str]:
    return ("lazy" if use.avoided_bytes else "present", "held" if use.is_in_use else "unheld")


def _said_of_entry(entry: AuditEntry) -> Iterable[str]:
    return (
        entry.operation, entry.outcome, entry.who, entry.job, entry.vertex, entry.credential, entry.by, entry.digest,
        entry.ref, entry.image, entry.source, entry.error,
    )  # fmt: skip


def _when(wall_s: float) -> str:
    """Return a time as people read it; "" for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(wall_s)) if wall_s else ""


def _moment(wall_s: float) -> str:
    """Return a time to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(wall_s))
