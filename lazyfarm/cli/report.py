"""``lazyfarm report``: a job as one file to look at, keep and send."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import InvalidArgumentError
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.job_report import page
from lazyfarm.cli.job_view import JobView
from lazyfarm.cli.options import JobArgument, JsonOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.graph import Definition
    from cluster.job import JobEvent
    from lazyfarm.records import FarmRecords, JobDetails

app = command_app()


@app.command(epilog=example("lazyfarm report 4f2a", "lazyfarm report 4f2a -o - | ssh web tee /srv/report.html"))
def report(
    *,
    job: JobArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to; - is standard output.", show_default=False)
    ] = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a job as one HTML file: timeline of each node, critical path, bytes by source, slowest layers.

    It is job-ID.html here unless --output says otherwise; an older one is replaced. A job that goes on is told of as
    far as it is. Needs Redis only: Ray is not joined.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        if output == "-" and as_json:
            raise InvalidArgumentError("--output", "-", "standard output is for the JSON document")

        async def read(records: FarmRecords) -> tuple[JobDetails, list[JobEvent], Definition | None]:
            details = await records.job(job)
            found = details.record.id
            return details, await records.events(found), await records.definition(found)

        details, events, definition = parts.with_records(parts.driving_settings(state_dir), read)
        view = JobView()
        for event in events:
            view.handle(event)
        text = page(details.record, details.targets, view, definition)
        if output == "-":
            sys.stdout.write(text)
            return
        file = Path(output or f"job-{details.record.id}.html")
        try:
            file.write_text(text)
        except OSError as exc:
            raise InvalidArgumentError("--output", str(file), exc.strerror or "it can't be written") from exc
        out.document({"job": details.record.id, "file": str(file.absolute())})
        out.line(f"wrote {file}")
