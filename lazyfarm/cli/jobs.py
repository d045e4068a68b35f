"""``lazyfarm jobs``: builds that go on, and those of the last week."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import InvalidArgumentError, JobEndedError
from cluster.job import JobEnded, JobEvent, JobState, JobWarning, VertexLog
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration
from lazyfarm.cli.job_progress import error_document
from lazyfarm.cli.job_view import JobView, LogLine, VertexView, at
from lazyfarm.cli.options import JobArgument, JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output
from lazyfarm.cli.terminal import one_line, visible, wants_colours

if TYPE_CHECKING:
    from cluster.job import JobRecord
    from lazyfarm.cli import documents
    from lazyfarm.jobs import FarmJobs
    from lazyfarm.records import FarmRecords, JobDetails

app = command_app()

#: Characters of a digest that name a vertex.
_FEWEST_DIGITS = 4
#: Characters of a target's name in a list.
_MAX_NAME_CHARS = 60


@app.callback(epilog=example("lazyfarm jobs ls", "lazyfarm jobs logs --follow 4f2a"))
def jobs() -> None:
    """List builds, look at one, and cancel it. Needs Redis only: Ray is not joined."""


@app.command("ls", epilog=example("lazyfarm jobs ls --json"))
def list_jobs(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """List the last 100 jobs, newest first. A job that has ended is known for a week."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_records(parts.driving_settings(state_dir), lambda records: records.jobs())
        out.document({"jobs": [summary(job) for job in found]})
        now_s = time.time()
        out.table(
            ("JOB", "STATE", "AGE", "TOOK", "TARGET", "LABELS"),
            [
                (
                    job.record.id,
                    state_of(job.record),
                    duration(max(now_s - job.record.created_wall_s, 0.0)),
                    _took(job.record, now_s),
                    _cut(", ".join(one_line(target) for target in job.targets)),
                    _labels(job.record),
                )
                for job in found
            ],
            numbers=("AGE", "TOOK"),
        )
        going = sum(not job.record.state.is_end for job in found)
        out.line(f"{count(len(found), 'job')}, {going} going on")


@app.command("show", epilog=example("lazyfarm jobs show 4f2a"))
def show_job(*, job: JobArgument, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Show one job: its state, its steps with their times, and what went wrong."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:

        async def read(records: FarmRecords) -> tuple[JobDetails, list[JobEvent]]:
            details = await records.job(job)
            return details, await records.events(details.record.id)

        details, events = parts.with_records(parts.driving_settings(state_dir), read)
        view = JobView()
        for event in events:
            view.handle(event)
        out.document(document(details, view))
        record, now_s = details.record, time.time()
        error = error_document(record.error)
        out.fields(
            [
                ("job", record.id),
                ("state", state_of(record)),
                *(("target", one_line(target)) for target in details.targets),
                ("submitted", f"{duration(max(now_s - record.created_wall_s, 0.0))} ago"),
                ("took", _took(record, now_s)),
                ("driver", _driver(record)),
                ("scheduler", record.owner or "none yet"),
                *((("labels", _labels(record)),) if record.spec.labels else ()),
                *((("error", one_line(error["message"])),) if error else ()),
                *((("hint", error["hint"]),) if error and error["hint"] else ()),
            ]
        )
        if view.vertices:
            end_s = view.until_wall_s(now_s)
            out.line("")
            out.table(
                ("#", "STEP", "TIME", "NAME"),
                [
                    (str(vertex.number or "-"), vertex.state.value, f"{vertex.busy_s(end_s):.1f} s", vertex.label)
                    for vertex in _in_order(view)
                ],
                numbers=("#", "TIME"),
            )


@app.command("logs", epilog=example("lazyfarm jobs logs 4f2a", "lazyfarm jobs logs --follow --vertex 'RUN make' 4f2a"))
def show_logs(
    *,
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    vertex: Annotated[
        str | None,
        typer.Option(
            "--vertex",
            metavar="STEP",
            help="Only what one step said, with nothing before its lines: its number, part of its name, or its digest.",
            show_default=False,
        ),
    ] = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a job's commands said, each line with the number of its step.

    Colours of theirs are kept on a terminal, other control sequences nowhere; of a line that was written over, such as
    a progress bar, its last state is told. With --json all is as it was said.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        logs = JobLogs(out, vertex)

        async def act(jobs: FarmJobs) -> JobRecord:
            found = await jobs.find(job)
            if follow:
                await jobs.follow(found.id, logs)
            else:
                for event in await jobs.told(found.id):
                    logs(event)
            return found

        record = parts.with_jobs(settings, act)
        logs.close()
        out.document({"job": record.id, "logs": logs.documents})


@app.command("cancel", epilog=example("lazyfarm jobs cancel 4f2a"))
def cancel_job(*, job: JobArgument, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Cancel a job. Steps that other jobs wait for go on; what was made stays in the cache."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:

        async def act(jobs: FarmJobs) -> tuple[JobRecord, JobState]:
            found = await jobs.find(job)
            return found, await jobs.cancel(found.id)

        record, state = parts.with_jobs(parts.driving_settings(state_dir), act)
        if state in (JobState.DONE, JobState.FAILED):
            raise JobEndedError(record.id, state.value)
        out.document({"job": record.id, "state": state.value})
        is_cancelled = state is JobState.CANCELLED
        out.line(f"job {record.id}: {'cancelled' if is_cancelled else 'its scheduler was asked to cancel it'}")


class JobLogs:
    """What the commands of a job said, printed as it comes."""

    def __init__(self, out: Output, wanted: str | None) -> None:
        """Print to *out*; *wanted*: what one step is called, None for all."""
        self._out = out
        self._wanted = wanted
        self._colours = wants_colours(out.stdout)
        self._view = JobView()
        self._named: set[int] = set()
        self._has_found = wanted is None
        #: Every chunk, for ``--json``.
        self.documents: list[dict[str, object]] = []

    def __call__(self, event: JobEvent) -> None:
        """Print the lines that an event completes."""
        lines = self._view.handle(event)
        if isinstance(event, JobEnded | JobWarning):
            return
        vertex = self._view.vertices[event.vertex]
        if not self._is_wanted(vertex):
            return
        self._has_found = True
        if isinstance(event, VertexLog) and self._out.as_json:
            told = {"vertex": vertex.digest, "name": vertex.name, "stream": event.stream.value, "text": event.text}
            self.documents.append({**told, "time": event.wall_s})
        self._print(vertex, lines)

    def close(self) -> None:
        """Print what was said without a newline at its end.

        Raises:
            InvalidArgumentError: the step that was asked for is not in the job.
        """
        for vertex in self._view.listed:
            if self._is_wanted(vertex):
                self._print(vertex, vertex.end_logs())
        if not self._has_found:
            raise InvalidArgumentError("--vertex", repr(self._wanted), "no step of the job is called that")

    def _print(self, vertex: VertexView, lines: list[LogLine]) -> None:
        for line in lines:
            text = visible(line.text, colours=self._colours)
            if self._wanted is not None:
                self._out.line(text, colours=self._colours)
                continue
            if vertex.number not in self._named:
                self._named.add(vertex.number)
                self._out.line(f"#{vertex.number} {vertex.label}")
            self._out.line(f"#{vertex.number} {at(line.at_s)} {text}", colours=self._colours)

    def _is_wanted(self, vertex: VertexView) -> bool:
        wanted = self._wanted
        if wanted is None:
            return True
        if wanted.removeprefix("#").isdecimal() and vertex.number == int(wanted.removeprefix("#")):
            return True
        digits = wanted.removeprefix("sha256:")
        if len(digits) >= _FEWEST_DIGITS and vertex.digest.removeprefix("sha256:").startswith(digits):
            return True
        return wanted.casefold() in vertex.label.casefold()


# -- documents ------------------------------------------------------------------------------------------


def summary(details: JobDetails) -> documents.JobSummary:
    """Return a job as ``jobs ls`` has it; times are wall-clock seconds of the farm's store, null: not yet."""
    record = details.record
    return {
        "job": record.id,
        "state": record.state.value,
        "created": record.created_wall_s,
        "ended": record.ended_wall_s,
        "targets": list(details.targets),
        "detached": record.spec.is_detached,
        "cancel_requested": record.is_cancel_requested,
        "abandoned": record.is_abandoned,
        "driver": record.spec.session.session_id,
        "scheduler": record.owner,
        "labels": record.spec.labels,
    }


def document(details: JobDetails, view: JobView) -> documents.JobDetails:
    """Return the JSON document of ``jobs show``."""
    return {
        **summary(details),
        # Not "error": that key says that the command itself has failed.
        "failure": error_document(details.record.error),
        "vertices": [
            {
                "vertex": vertex.digest,
                "number": vertex.number or None,
                "name": vertex.name,
                "state": vertex.state.value,
                "started": vertex.started_wall_s,
                "ended": vertex.ended_wall_s,
                "failure": error_document(vertex.error),
            }
            for vertex in _in_order(view)
        ],
    }


def state_of(record: JobRecord) -> str:
    """Return a job's state as people see it."""
    if record.state.is_end:
        return record.state.value
    if record.is_cancel_requested:
        return "cancelling"
    return "abandoned" if record.is_abandoned else record.state.value


def _in_order(view: JobView) -> list[VertexView]:
    waiting = [vertex for vertex in view.vertices.values() if not vertex.number]
    return view.listed + waiting


def _took(record: JobRecord, now_s: float) -> str:
    if record.state is JobState.QUEUED:
        return "-"
    return duration(max((record.ended_wall_s or now_s) - record.created_wall_s, 0.0))


def _driver(record: JobRecord) -> str:
    session = record.spec.session.session_id
    return f"{session} (detached: the job goes on without it)" if record.spec.is_detached else session


def _labels(record: JobRecord) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(record.spec.labels.items()))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_NAME_CHARS else text[: _MAX_NAME_CHARS - 1] + "…"
