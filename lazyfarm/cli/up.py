"""``lazyfarm up``: the farm runs, whatever ran before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.status import show
from lazyfarm.settings import FarmSettings, is_there, load_wanted
from storage.services.page import page_link

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.launch import UpReport

app = command_app()


@app.command(epilog=example("lazyfarm up --nodes 3", "lazyfarm up --config production.toml", "lazyfarm up --retire"))
def up(
    *,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            max=100,
            metavar="N",
            help="Nodes on this machine. Default: as many as run; ray.nodes at first, and when it was changed.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Configuration. Remembered: a later `up` without it reads the file again.",
            show_default=False,
        ),
    ] = None,
    retire: Annotated[
        bool,
        typer.Option(
            "--retire",
            help="After an upgrade: end the actors of other releases, and with them what drivers of those still do.",
        ),
    ] = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start what is missing, and wait for it: Redis, S3, Ray, the supervisor and the actors, the page, the gateway.

    What the configuration names by address is used, not started. Once all runs this does nothing, and says so;
    after a crash it repairs; where the configuration was changed, actors start anew with it. After an upgrade it
    starts the new release's actors beside those of the old one.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        parts.raise_if_outside(state_dir, config)
        settings = load_wanted(state_dir, config, os.environ)
        if settings.config_file is not None and not is_there(settings.config_file):
            out.line(f"{settings.config_file} is gone: going on with what was recorded of it")
        with out.undisturbed():
            report = bring_up(settings, nodes, retire, out.line)
        for done, those in (("stopped", report.stopped), ("started", report.started)):
            if those:
                out.line(f"{done}: {', '.join(those)}")
        if report.others:
            out.line(f"actors of {', '.join(report.others)} go on for drivers of it; `lazyfarm up --retire` ends them")
        if not report.changed:
            out.line("already up: nothing was changed")
        what = {"changed": report.changed, "started": list(report.started), "stopped": list(report.stopped)}
        show(parts.status(report.settings), out, what)
        out.line("")
        if (link := page_link(settings.state_dir)) and out.stdout.isatty():
            out.line(f"page: {link}")  # on a terminal alone: what is kept of a command's output holds no token
        out.line(f"state and logs: {report.settings.state_dir} ({count(len(report.started), 'part')} started)")


def bring_up(
    settings: FarmSettings,
    nodes: int | None,
    retire: bool,  # noqa: FBT001 - as the option
    report: Callable[[str], None],
) -> UpReport:
    """Start what is missing."""
    from actors.launch import up as launch  # noqa: PLC0415 - Ray: not for --help, nor for a faulty configuration

    return launch(settings, nodes=nodes, retire=retire, report=report)
