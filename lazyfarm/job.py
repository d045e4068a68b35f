"""Builds as a driver sees them: a job that is awaited or looked at, and what it came to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster import tracing
from cluster.errors import InternalError, InvalidArgumentError, JobCancelledError
from cluster.job import JobEnded, JobEvent, JobId, JobRecord, JobState
from cluster.job_result import InlineEntry
from cluster.wire import decode_error
from lazyfarm.ref import Ref

#: Ray puts larger arguments of calls into its object store, and may write that to a disk.
_MAX_SECRET_BYTES = 64 * 1024

EventCallback = Callable[[JobEvent], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What a build came to, held by its driver's lease."""

    job: JobId
    #: One for each target, in the order in which they were asked for. Lazy as far as nothing had to be moved.
    refs: tuple[Ref, ...]
    #: Image config (JSON) for what is made of it; None: of no image.
    config: bytes | None = field(default=None, repr=False)
    #: For each target, what a cache within its image's config is to say; nothing where none was asked for.
    inline: tuple[tuple[InlineEntry, ...], ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return "".join(ref._repr_html_() for ref in self.refs)

    @property
    def ref(self) -> Ref:
        """Return the ref of the only target.

        Raises:
            InvalidArgumentError: there are several.
        """
        if len(self.refs) != 1:
            raise InvalidArgumentError("ref", "taken", f"the build has {len(self.refs)} targets: use `refs`")
        return self.refs[0]


class Jobs(Protocol):
    """What a job asks of its farm."""

    def attending_job(self, job: JobId) -> contextlib.AbstractAsyncContextManager[None]:
        """Be there for it while the body runs."""
        ...

    def follow_job(self, job: JobId) -> AsyncIterator[JobEvent]:
        """Yield its events, from the first one to its end."""
        ...

    async def cancel_job(self, job: JobId) -> JobState:
        """Ask for it to be cancelled."""
        ...

    async def get_job(self, job: JobId) -> JobRecord:
        """Return its record."""
        ...

    async def job_result(self, record: JobRecord) -> Result:
        """Return what a job that is done came to, held by the driver."""
        ...


class Job:
    """A build: ``await`` it for its :class:`Result`, or look on first.

    ::

        job = farm.solve(graph)
        async for event in job.events():
            print(event)
        result = await job

    Submitted when it is first awaited or looked at, or by :meth:`submitted`. An attached job is cancelled when who
    awaits it is, and when its driver has been gone for 30 s; a detached one goes on.
    """

    def __init__(
        self,
        farm: Jobs,
        job_id: JobId,
        *,
        submit: Callable[[], Awaitable[None]] | None,
        is_detached: bool,
        on_event: EventCallback | None = None,
    ) -> None:
        """Make one; *submit* None: it was submitted before, by whomever."""
        self._farm = farm
        self._id = job_id
        self._submit = submit
        self._is_detached = is_detached
        self._on_event = on_event
        self._submitting: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Job {self._id}>"

    @property
    def id(self) -> JobId:
        """Return its ID: ``lazyfarm attach ID`` looks on from elsewhere."""
        return self._id

    def __await__(self) -> Generator[Any, None, Result]:
        return self._traced_result().__await__()

    async def submitted(self) -> Job:
        """Return once it is submitted: a detached one goes on from here, whatever becomes of this process."""
        if self._submit is not None:
            if self._submitting is None:
                self._submitting = asyncio.ensure_future(self._submit())
            submitting = self._submitting
            try:
                await asyncio.shield(submitting)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if submitting.cancelled() and task is not None and not task.cancelling():
                    # By another who awaited it, and was cancelled: here that is the job's end, not the caller's.
                    raise JobCancelledError(self._id) from None
                raise
        return self

    async def events(self) -> AsyncIterator[JobEvent]:
        """Yield its events, from the first one to its end, also to who comes late. Submits it, and is there for it."""
        async with self._there():
            async for event in self._farm.follow_job(self._id):
                yield event

    async def record(self) -> JobRecord:
        """Return what is recorded of it now."""
        return await self._farm.get_job(self._id)

    async def cancel(self) -> JobState:
        """Ask for it to be cancelled; return its state after that. It may have ended before."""
        return await self._farm.cancel_job(self._id)

    @contextlib.asynccontextmanager
    async def _there(self) -> AsyncIterator[None]:
        await self.submitted()
        if self._is_detached or self._submit is None:
            yield
            return
        async with self._farm.attending_job(self._id):
            yield

    async def _traced_result(self) -> Result:
        with tracing.beginning("solve", {tracing.JOB: self._id}):
            return await self._result()

    async def _result(self) -> Result:
        try:
            async with self._there():
                state, error = await self._end()
                if state is JobState.DONE:
                    return await self._farm.job_result(await self._farm.get_job(self._id))
        except asyncio.CancelledError:
            if not self._is_detached and self._submit is not None:
                with contextlib.suppress(Exception):
                    await asyncio.shield(self._withdraw())
            raise
        if state is JobState.FAILED:
            raise decode_error(error)
        raise JobCancelledError(self._id)

    async def _withdraw(self) -> None:
        """Have nothing done for the job any more, also where it is still being submitted."""
        submitting = self._submitting
        if submitting is not None and not submitting.done():
            self._submitting = None
            submitting.cancel()
            await asyncio.wait([submitting])
        # Also after that: it may have been cancelled when the farm had the job, and before it said so.
        await self._farm.cancel_job(self._id)

    async def _end(self) -> tuple[JobState, bytes]:
        """Look on to the end; return how it ended."""
        async for event in self._farm.follow_job(self._id):
            if self._on_event is not None:
                self._on_event(event)
            if isinstance(event, JobEnded):
                return event.state, event.error
        raise InternalError(f"the events of job {self._id} ended without an end")


def read_secrets(secrets: Mapping[str, bytes | str | Path]) -> dict[str, bytes]:
    """Return the values of secrets: bytes as they are, texts in UTF-8, paths by what is in the file.

    Raises:
        InvalidArgumentError: a file can't be read, or a value is too large.
    """
    values: dict[str, bytes] = {}
    for name, value in secrets.items():
        try:
            if isinstance(value, Path):
                values[name] = value.read_bytes()
            else:
                values[name] = value.encode() if isinstance(value, str) else bytes(value)
        except OSError as exc:
            raise InvalidArgumentError(f"secret {name!r}", str(value), exc.strerror or str(exc)) from exc
        if len(values[name]) > _MAX_SECRET_BYTES:
            reason = f"a secret has at most {_MAX_SECRET_BYTES} bytes, so that it is sent as it is and rests nowhere"
            raise InvalidArgumentError(f"secret {name!r}", f"of {len(values[name])} bytes", reason)
    return values
