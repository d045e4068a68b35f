"""The blocking twin of :mod:`lazyfarm.farm`: the same methods, run on an event loop of its own.

One source: every method is its asynchronous original, wrapped, with the original's signature and docstring.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Concatenate, Generic, ParamSpec, Self, TypeVar

from cluster.cache_options import CacheSource, CacheTarget
from cluster.descriptor import Descriptor
from cluster.graph import Definition
from cluster.job import JobId
from cluster.lease import Lease, LeaseId
from cluster.messages import PushResult
from cluster.provider import DescHandler
from cluster.ref import ImageRecord, RefId, RefState
from lazyfarm import farm as asynchronous
from lazyfarm import job as asynchronous_job
from lazyfarm import ref as asynchronous_ref
from lazyfarm.graph import Resolved, State
from lazyfarm.job import EventCallback
from lazyfarm.lease import FarmLease as AsyncFarmLease
from lazyfarm.operation import ProgressCallback
from lazyfarm.outputs import Output
from storage.registry.credentials import CredentialSource

T = TypeVar("T")
P = ParamSpec("P")
OriginalT = TypeVar("OriginalT")


class _LoopThread:
    """An event loop on a thread: where the asynchronous originals live."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lazyfarm-blocking", daemon=True)
        self._thread.start()

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Run what *make* returns and wait; an interrupt of the waiting thread cancels it and waits for its end."""
        ended = threading.Event()

        async def work() -> T:
            try:
                return await make()
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not ended.is_set():
                future.cancel()
                ended.wait(10.0)
            raise

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        self._loop.close()


class _Twin(Generic[OriginalT]):
    """An object whose methods run the original's on the loop's thread."""

    def __init__(self, original: OriginalT, loop: _LoopThread) -> None:
        self._original = original
        self._loop = loop

    def __repr__(self) -> str:
        return f"<blocking {self._original!r}>"

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows; None where that is :func:`repr`."""
        html = getattr(self._original, "_repr_html_", None)
        return None if html is None else str(html())


def _blocking(
    method: Callable[Concatenate[OriginalT, P], Awaitable[T]],
) -> Callable[Concatenate[_Twin[OriginalT], P], T]:
    """Return the blocking twin of an asynchronous method."""

    def call(self: _Twin[OriginalT], /, *args: P.args, **kwargs: P.kwargs) -> T:
        # By its name: the original may be of a class below the one that is spelled here.
        found: Callable[P, Awaitable[T]] = getattr(self._original, method.__name__)
        return self._loop.run(lambda: found(*args, **kwargs))

    call.__doc__ = method.__doc__
    return call


class Ref(_Twin[asynchronous_ref.Ref]):
    """Blocking twin of :class:`lazyfarm.ref.Ref`."""

    @property
    def id(self) -> RefId:
        """Return the ID of the top layer's ref."""
        return self._original.id

    @property
    def image(self) -> str:
        """Return the normalised name of the image it came from."""
        return self._original.image

    @property
    def digest(self) -> str:
        """Return the digest of the image's manifest."""
        return self._original.digest

    @property
    def record(self) -> ImageRecord | None:
        """Return the image's record."""
        return self._original.record

    @property
    def layers(self) -> tuple[RefState, ...]:
        """Return the layers, lowest first, as they were when this was read."""
        return self._original.layers

    @property
    def is_lazy(self) -> bool:
        """Tell whether any layer was not in the content store when this was read."""
        return self._original.is_lazy

    def release(self) -> None:
        """Say that this object is not used any more."""
        self._original.release()

    unlazy = _blocking(asynchronous_ref.Ref.unlazy)
    extract = _blocking(asynchronous_ref.Ref.extract)
    extract_everywhere = _blocking(asynchronous_ref.Ref.extract_everywhere)
    refresh = _blocking(asynchronous_ref.Ref.refresh)


class Result(_Twin[asynchronous_job.Result]):
    """Blocking twin of :class:`lazyfarm.job.Result`."""

    @property
    def job(self) -> JobId:
        """Return the ID of the job."""
        return self._original.job

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Return a ref for each target."""
        return tuple(Ref(ref, self._loop) for ref in self._original.refs)

    @property
    def ref(self) -> Ref:
        """Return the ref of the only target."""
        return Ref(self._original.ref, self._loop)

    @property
    def config(self) -> bytes | None:
        """Return the image config (JSON)."""
        return self._original.config


class Job(_Twin[asynchronous_job.Job]):
    """Blocking twin of :class:`lazyfarm.job.Job`."""

    @property
    def id(self) -> JobId:
        """Return its ID."""
        return self._original.id

    def result(self) -> Result:
        """Wait for what it comes to; raises as awaiting the original does."""
        return Result(self._loop.run(lambda: self._original), self._loop)

    record = _blocking(asynchronous_job.Job.record)
    cancel = _blocking(asynchronous_job.Job.cancel)


class FarmLease(_Twin[AsyncFarmLease]):
    """Blocking twin of :class:`lazyfarm.lease.FarmLease`."""

    @property
    def id(self) -> LeaseId:
        """Return its ID."""
        return self._original.id

    attach = _blocking(AsyncFarmLease.attach)

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError once the lease is gone."""
        self._original.raise_if_lost()


class Farm(_Twin[asynchronous.Farm]):
    """Blocking twin of :class:`lazyfarm.farm.Farm`.

    ::

        with Farm.connect() as farm:
            print(farm.pull("debian:12").extract().path)
    """

    @property
    def session_id(self) -> str:
        """Return the ID of this driver's session."""
        return self._original.session_id

    @classmethod
    def connect(
        cls,
        state_dir: Path | str | None = None,
        *,
        config: Path | str | None = None,
        credentials: CredentialSource | Mapping[str, tuple[str, str]] | None = None,
        keep: bool = False,
        token: str | None = None,
        token_file: Path | str | None = None,
        ca_file: Path | str | None = None,
    ) -> Self:
        """Join a farm, or its gateway; see :meth:`lazyfarm.farm.Farm.connect`."""
        loop = _LoopThread()
        try:
            original = loop.run(
                lambda: asynchronous.Farm.connect(
                    state_dir,
                    config=config,
                    credentials=credentials,
                    keep=keep,
                    token=token,
                    token_file=token_file,
                    ca_file=ca_file,
                )
            )
        except BaseException:
            loop.close()
            raise
        return cls(original, loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(discard=error is not None)

    def close(self, *, discard: bool = False) -> None:
        """Give back what this driver holds, and leave; see :meth:`lazyfarm.farm.Farm.close`."""
        try:
            self._loop.run(lambda: self._original.close(discard=discard))
        finally:
            self._loop.close()

    def pull(
        self,
        image: str,
        *,
        platform: str | None = None,
        plain_http: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Ref:
        """Resolve *image*; see :meth:`lazyfarm.farm.Farm.pull`."""
        found = self._loop.run(
            lambda: self._original.pull(image, platform=platform, plain_http=plain_http, progress=progress)
        )
        return Ref(found, self._loop)

    def get(self, ref: str) -> Ref:
        """Look up a ref; see :meth:`lazyfarm.farm.Farm.get`."""
        return Ref(self._loop.run(lambda: self._original.get(ref)), self._loop)

    def push(
        self,
        ref: Ref | str | Result,
        target: str,
        *,
        plain_http: bool = False,
        progress: ProgressCallback | None = None,
    ) -> PushResult:
        """Push an image; see :meth:`lazyfarm.farm.Farm.push`."""
        original = ref if isinstance(ref, str) else ref._original  # noqa: SLF001  # its own twin
        return self._loop.run(lambda: self._original.push(original, target, plain_http=plain_http, progress=progress))

    def solve(
        self,
        graph: State | Sequence[State] | Resolved | Definition,
        *,
        config: bytes | None = None,
        no_cache: bool = False,
        secrets: Mapping[str, bytes | str | Path] | None = None,
        labels: Mapping[str, str] | None = None,
        cache_from: Sequence[str | CacheSource] = (),
        cache_to: Sequence[str | CacheTarget] = (),
        on_event: EventCallback | None = None,
    ) -> Result:
        """Build what a graph describes and wait for it; see :meth:`lazyfarm.farm.Farm.solve`."""
        job = self._original.solve(
            graph,
            config=config,
            no_cache=no_cache,
            secrets=secrets,
            labels=labels,
            cache_from=cache_from,
            cache_to=cache_to,
            on_event=on_event,
        )
        return Result(self._loop.run(lambda: job), self._loop)

    def submit(
        self,
        graph: State | Sequence[State] | Resolved | Definition,
        *,
        config: bytes | None = None,
        no_cache: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> Job:
        """Submit a detached job; see :meth:`lazyfarm.farm.Farm.submit`."""
        submitted = self._loop.run(
            lambda: self._original.submit(graph, config=config, no_cache=no_cache, labels=labels)
        )
        return Job(submitted, self._loop)

    def job(self, job: str) -> Job:
        """Return the job of an ID; see :meth:`lazyfarm.farm.Farm.job`."""
        return Job(self._loop.run(lambda: self._original.job(job)), self._loop)

    def tag(self, result: Result, name: str, *, created_s: int | None = None) -> Ref:
        """Make an image of a result; see :meth:`lazyfarm.farm.Farm.tag`."""
        original = result._original  # noqa: SLF001  # its own twin
        return Ref(self._loop.run(lambda: self._original.tag(original, name, created_s=created_s)), self._loop)

    def export(
        self,
        result: Result | Ref,
        output: str | Output,
        *,
        names: Sequence[str] = (),
        stdout: BinaryIO | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Write a result or an image to this machine; see :meth:`lazyfarm.farm.Farm.export`."""
        original = result._original  # noqa: SLF001  # its own twin
        self._loop.run(lambda: self._original.export(original, output, names=names, stdout=stdout, progress=progress))

    def get_by_blob(
        self,
        descriptor: Descriptor,
        parent: Ref | None = None,
        handlers: Sequence[DescHandler] = (),
        lease: FarmLease | None = None,
        image_ref: str | None = None,
    ) -> Ref:
        """Make or find the ref of one layer; see :meth:`lazyfarm.farm.Farm.get_by_blob`."""
        below = parent._original if parent is not None else None  # noqa: SLF001  # its own twins
        held = lease._original if lease is not None else None  # noqa: SLF001
        found = self._loop.run(
            lambda: self._original.get_by_blob(descriptor, below, handlers, lease=held, image_ref=image_ref)
        )
        return Ref(found, self._loop)

    @contextmanager
    def lease(self, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None) -> Iterator[FarmLease]:
        """Hold a lease while the body runs; see :meth:`lazyfarm.farm.Farm.lease`."""
        manager = self._original.lease(ttl_s=ttl_s, labels=labels)
        lease = self._loop.run(manager.__aenter__)
        try:
            yield FarmLease(lease, self._loop)
        finally:
            self._loop.run(lambda: manager.__aexit__(None, None, None))

    resolve = _blocking(asynchronous.Farm.resolve)
    refs = _blocking(asynchronous.Farm.refs)
    images = _blocking(asynchronous.Farm.images)

    def pin(self, ref: Ref, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None) -> Lease:
        """Keep a ref when this driver has long gone; see :meth:`lazyfarm.farm.Farm.pin`."""
        return self._loop.run(lambda: self._original.pin(ref._original, ttl_s=ttl_s, labels=labels))  # noqa: SLF001

    du = _blocking(asynchronous.Farm.du)
    prune = _blocking(asynchronous.Farm.prune)
    node_usage = _blocking(asynchronous.Farm.node_usage)
    prune_nodes = _blocking(asynchronous.Farm.prune_nodes)
    verify = _blocking(asynchronous.Farm.verify)
    kept = _blocking(asynchronous.Farm.kept)
    audit = _blocking(asynchronous.Farm.audit)
    drain = _blocking(asynchronous.Farm.drain)
    undrain = _blocking(asynchronous.Farm.undrain)
    unpin = _blocking(asynchronous.Farm.unpin)
    leases = _blocking(asynchronous.Farm.leases)
    nodes = _blocking(asynchronous.Farm.nodes)
    page = _blocking(asynchronous.Farm.page)
