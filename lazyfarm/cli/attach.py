"""``lazyfarm attach``: a job's progress, from its start to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from cluster.errors import InternalError, JobCancelledError
from cluster.job import JobState
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import EXIT_INTERRUPTED, reporting
from lazyfarm.cli.job_progress import check_mode, showing
from lazyfarm.cli.job_view import read_error
from lazyfarm.cli.options import JobArgument, JsonOption, ProgressOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output

if TYPE_CHECKING:
    from cluster.job import JobEnded, JobEvent, JobRecord
    from lazyfarm.jobs import FarmJobs

app = command_app()


@app.command(epilog=example("lazyfarm attach 4f2a", "lazyfarm attach --progress plain 4f2a"))
def attach(
    *,
    job: JobArgument,
    progress: ProgressOption = "auto",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Follow a job to its end. Exit 0: it is done; 1: it failed or was cancelled.

    While this runs the job is taken care of, though its driver may have died. Ctrl-C leaves the job alone: it goes
    on, exit 130.
    """
    check_mode(progress, as_json=as_json)
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        found: list[JobRecord] = []
        with showing(out, progress) as watch:

            async def act(jobs: FarmJobs) -> JobEnded:
                found.append(await jobs.find(job))
                return await jobs.attend(found[0].id, watch or _ignore)

            try:
                end = parts.with_jobs(settings, act)
            except KeyboardInterrupt:
                if not found:
                    raise
                interrupted = True
            else:
                interrupted = False
        if interrupted:
            _say_detached(out, found[0])
            raise typer.Exit(EXIT_INTERRUPTED)
        raise_if_not_done(found[0].id, end)
        out.document({"job": found[0].id, "state": end.state.value})


def raise_if_not_done(job: str, end: JobEnded) -> None:
    """Raise what a job failed with.

    Raises:
        JobCancelledError: it was cancelled.
        ClusterError: it failed.
    """
    if end.state is JobState.DONE:
        return
    if end.state is JobState.CANCELLED:
        raise JobCancelledError(job)
    raise read_error(end.error) or InternalError(f"job {job} failed without an error")


def _ignore(event: JobEvent) -> None:
    """Look away."""


def _say_detached(out: Output, record: JobRecord) -> None:
    goes_on = "goes on" if record.spec.is_detached else "goes on for as long as its driver does"
    what = f"detached: job {record.id} {goes_on}"
    if out.as_json:
        out.error("Interrupted", what, f"`lazyfarm attach {record.id}` follows it again")
    else:
        out.stderr.write(f"{what}; `lazyfarm attach {record.id}` follows it again\n")
