"""``lazyfarm down``: ends what ``up`` started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.settings import FarmSettings, load_running

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.launch import DownReport

app = command_app()


@app.command(epilog=example("lazyfarm down", "lazyfarm down --purge"))
def down(
    *,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove the farm's data as well: refs, blobs, snapshots.")
    ] = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """End exactly what `up` started here, and keep the data. Needs no valid configuration."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        parts.raise_if_outside(state_dir)
        settings = load_running(state_dir, os.environ)
        with out.undisturbed():
            report = bring_down(settings, purge, out.line)
        out.document({"stopped": list(report.stopped)})
        if not report.was_farm:
            out.line(f"nothing was running there: {settings.state_dir} is no farm's")
            return
        out.line(f"stopped: {', '.join(report.stopped)}" if report.stopped else "nothing was running")
        if purge:
            out.line(f"removed the farm's data in {settings.state_dir}")
            if report.left:
                out.line(f"left there, as not the farm's: {', '.join(report.left)}")
        else:
            out.line(f"kept the farm's data in {settings.state_dir}; `lazyfarm down --purge` removes it")


def bring_down(settings: FarmSettings, purge: bool, report: Callable[[str], None]) -> DownReport:  # noqa: FBT001 - passed on
    """End what runs."""
    from actors.launch import down as launch  # noqa: PLC0415 - as in up.py

    return launch(settings, purge=purge, report=report)
