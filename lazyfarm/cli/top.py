"""``lazyfarm top``: what a farm does now, in a terminal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output
from lazyfarm.cli.terminal import one_line

if TYPE_CHECKING:
    from lazyfarm.cli import documents
    from lazyfarm.now import Look, Now

app = command_app()

_EVERY_S = 1.0
#: Lines of what there may be thousands of.
_MOST = 15


@app.command(epilog=example("lazyfarm top", "lazyfarm top --json"))
def top(
    *,
    every_s: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = _EVERY_S,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show layers that move, builds that go on and what each node does, live; Ctrl-C ends it.

    In a pipe, and with --json, it looks once. Reads Redis only: Ray is not joined.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:

        async def watch(look: Look) -> None:
            if out.is_live:
                await _watch(out, look, every_s)
                return
            await look()  # a rate is told of two looks
            await asyncio.sleep(every_s)
            show(out, await look())

        parts.with_looks(parts.driving_settings(state_dir), watch)


def show(out: Output, now: Now) -> None:
    """Print it once."""
    out.document(_document(now))
    out.line(f"{count(len(now.flights), 'flight')}, {size(now.rate)}/s; {count(len(now.jobs), 'job')} going on")
    out.line("")
    out.table(
        ("NODE", "STATE", "OPS", "FETCHES"),
        [
            (
                node.id,
                node.state,
                str(now.ops.get(node.id, 0)),
                str(sum(flight.owner.startswith(f"{node.id}/") for flight in now.flights)),
            )
            for node in now.nodes
        ],
        numbers=("OPS", "FETCHES"),
    )
    if now.flights:
        out.line("")
        out.table(
            ("FLIGHT", "OWNER", "CAME", "OF", "A SECOND", "LEFT", "WAITING"),
            [
                (
                    f"{flight.work} {short(flight.subject)}",
                    flight.owner,
                    size(flight.current_bytes),
                    size(flight.total_bytes) if flight.total_bytes else "",
                    size(flight.rate) if flight.rate else "",
                    duration(flight.left_s) if flight.left_s is not None else "",
                    str(flight.waiters),
                )
                for flight in now.flights[:_MOST]
            ],
            numbers=("CAME", "OF", "A SECOND", "LEFT", "WAITING"),
        )
        _more(out, len(now.flights))
    if now.jobs:
        out.line("")
        out.table(
            ("JOB", "STATE", "FOR", "TARGET"),
            [
                (
                    record.id,
                    record.state.value,
                    duration(max(now.now_wall_s - record.created_wall_s, 0.0)),
                    ", ".join(one_line(target) for target in targets),
                )
                for record, targets in now.jobs[:_MOST]
            ],
            numbers=("FOR",),
        )
        _more(out, len(now.jobs))


async def _watch(out: Output, look: Look, every_s: float) -> None:
    """Show it again and again, in place of what was shown before."""
    import io  # noqa: PLC0415 - for a terminal only, as rich

    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with Live(console=Console(file=out.stdout), screen=True, auto_refresh=False) as live:
        while True:
            page = Output(as_json=False)
            page.stdout = io.StringIO()
            show(page, await look())
            live.update(Text(page.stdout.getvalue(), no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(every_s)


def _more(out: Output, number: int) -> None:
    if number > _MOST:
        out.line(f"and {number - _MOST} more")


def _document(now: Now) -> documents.Top:
    return {
        "nodes": [
            {"id": node.id, "alive": node.alive, "draining": node.draining, "ops": now.ops.get(node.id, 0)}
            for node in now.nodes
        ],
        "flights": [
            {
                "key": flight.key,
                "owner": flight.owner,
                "current": flight.current_bytes,
                "total": flight.total_bytes,
                "rate": flight.rate,
                "waiters": flight.waiters,
            }
            for flight in now.flights
        ],
        "jobs": [
            {"job": record.id, "state": record.state.value, "targets": [*targets]} for record, targets in now.jobs
        ],
    }
