"""``lazyfarm extract``: a ref's filesystem, mounted on a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import completing, parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import duration
from lazyfarm.cli.layers import watching
from lazyfarm.cli.options import JsonOption, RefArgument, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.messages import ExtractResult
    from lazyfarm.cli import documents
    from lazyfarm.farm import Farm

app = command_app()


@app.command(epilog=example("lazyfarm extract debian:12", "lazyfarm extract --all-nodes debian:12"))
def extract(
    *,
    ref: RefArgument,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            metavar="ID",
            help="The node, as `lazyfarm status` names it. Default: any.",
            show_default=False,
            autocompletion=completing.nodes,
        ),
    ] = None,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Every live node.")] = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a ref's layers to a node, unpack them, and say where they are mounted. Read-only."""
    if node is not None and all_nodes:
        raise typer.BadParameter("--node names one node, --all-nodes means all: give one of them")
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        with watching(out) as watch:

            async def act(farm: Farm) -> Sequence[ExtractResult]:
                found = await farm.get(ref)
                if all_nodes:
                    return await found.extract_everywhere(progress=watch)
                return [await found.extract(node, progress=watch)]

            results = parts.acting(settings, out, "extract", act)
        out.document(document(results))
        out.table(
            ("NODE", "TIME", "PATH"),
            [(result.node, duration(result.seconds), result.path) for result in results],
            numbers=("TIME",),
        )


def document(results: Sequence[ExtractResult]) -> documents.Extracted:
    """Return the JSON document of an extract, on one node or several."""
    return {
        "ref": results[0].ref_id if results else "",
        "nodes": [{"node": result.node, "path": result.path, "seconds": result.seconds} for result in results],
    }
