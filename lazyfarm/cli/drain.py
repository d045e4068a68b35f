"""``lazyfarm drain``: have a node end what it does, and get nothing new."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import completing, parts
from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.human import count, duration
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.settings import load_settings

if TYPE_CHECKING:
    from cluster.drain import UnderWay
    from lazyfarm.cli.output import Output
    from lazyfarm.drain import FarmDrain
    from lazyfarm.farm import Farm

app = command_app()

_TIMEOUT_S = 600.0


@app.command(epilog=example("lazyfarm drain n1", "lazyfarm drain n1 --timeout 60", "lazyfarm drain n1 --undo"))
def drain(
    *,
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE",
            help="As `lazyfarm status` names it.",
            show_default=False,
            autocompletion=completing.nodes,
        ),
    ],
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.0, metavar="SECONDS", help="For which to wait for what is under way.")
    ] = _TIMEOUT_S,
    undo: Annotated[bool, typer.Option("--undo", help="Have the node take work again.")] = False,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Names the farm's Redis, on a machine that has no state directory of the farm.",
            show_default=False,
        ),
    ] = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a node no new ops, fetches or extracts, and wait until those that it has are over.

    Exit status 1 if some are left at the timeout: the node goes on with them, and others take over when it is stopped.
    It drains until --undo, also when it, or anything else of the farm, is started again.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = load_settings(state_dir, config, os.environ) if config else parts.driving_settings(state_dir)
        if undo:
            parts.with_drain(settings, lambda farm: farm.undrain(node))
            out.document({"node": node, "draining": False})
            out.line(f"{node} takes work again")
            return

        async def wait(farm: FarmDrain | Farm) -> UnderWay:
            return await farm.drain(node, timeout_s=timeout_s, on_left=lambda left: _progress(out, node, left))

        left = parts.with_drain(settings, wait)
        if out.is_live:
            out.stdout.write("\r\x1b[K")
        out.document(
            {
                "node": node,
                "draining": True,
                "drained": left.is_nothing,
                "ops": left.ops,
                "fetches": left.fetches,
                "calls": left.calls,
            }
        )
        if left.is_nothing:
            out.line(f"{node} has drained: nothing is under way there, and nothing new comes")
            return
        out.line(
            f"{node} drains; after {duration(timeout_s)} it still has {told(left)}. "
            "It goes on with them; when it is stopped, other nodes take over"
        )
        raise typer.Exit(EXIT_ERROR)


def _progress(out: Output, node: str, left: UnderWay) -> None:
    if out.is_live:
        out.stdout.write(f"\r\x1b[K{node} drains: {told(left)}")
        out.stdout.flush()


def told(left: UnderWay) -> str:
    """Return what is under way, for people."""
    return f"{count(left.ops, 'op')}, {count(left.fetches, 'flight')}, {count(left.calls, 'call')}"
