"""``lazyfarm audit``: who had what done with which layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.audit import AuditFilter, Operation
from cluster.errors import InvalidArgumentError
from lazyfarm.cli import completing, parts
from lazyfarm.cli.audit_lines import audit_document, audit_line
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.options import StateDirOption, command_app, example
from lazyfarm.cli.quantities import parse_duration

if TYPE_CHECKING:
    from cluster.ports import AuditReader

app = command_app()


@app.command(
    epilog=example(
        "lazyfarm audit --since 1h",
        "lazyfarm audit --digest sha256:3ab1 --json",
        "lazyfarm audit --follow --json >>audit.jsonl",
    )
)
def audit(
    *,
    since: Annotated[
        str,
        typer.Option(metavar="DURATION", help="Only what is newer, as 90s, 12h or 7d. Default: all that is kept."),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")] = False,
    job: Annotated[
        str,
        typer.Option(
            metavar="JOB", help="Only this job's: its ID, or the start of one.", autocompletion=completing.jobs
        ),
    ] = "",
    digest: Annotated[
        str, typer.Option(metavar="DIGEST", help="Only of this blob or manifest: its digest, or the start of one.")
    ] = "",
    operation: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"Only these: {', '.join(Operation)}.", autocompletion=completing.one_of(*Operation)
        ),
    ] = "",
    state_dir: StateDirOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines, one object an entry, and nothing else, to stdout.")
    ] = False,
) -> None:
    """Tell who had what done with which layer, as whom, from where, and what came of it. Ray is not joined.

    Oldest first. Credentials are told by handles that say only which are the same. How much is kept, and how long, is
    `audit` in the configuration.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        if operation and operation not in {*Operation}:
            raise InvalidArgumentError("--operation", repr(operation), f"there are {', '.join(Operation)}")
        last_s = parse_duration("--since", since) if since else None
        wanted = AuditFilter(job=job, digest=digest, operation=operation)

        async def tell(stream: AuditReader) -> None:
            async for entry in stream.follow(last_s=last_s) if follow else stream.entries(last_s=last_s):
                if wanted.matches(entry):
                    out.document(audit_document(entry))
                    out.line(audit_line(entry))

        parts.with_audit(parts.driving_settings(state_dir), tell)
