"""``lazyfarm push``: a ref's image goes to a registry, without the bytes where that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.reference import parse_reference
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import short, size
from lazyfarm.cli.layers import watching
from lazyfarm.cli.options import JsonOption, PlainHttpOption, RefArgument, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.messages import PushResult
    from lazyfarm.cli import documents
    from lazyfarm.farm import Farm

app = command_app()


@app.command(epilog=example("lazyfarm push debian:12 registry.internal/base/debian:12"))
def push(
    *,
    ref: RefArgument,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="[HOST[:PORT]/]REPOSITORY[:TAG]", show_default=False)],
    plain_http: PlainHttpOption = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Push an image. Layers that the target has, or can mount from a repository it came from, don't move."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        parse_reference(target)
        settings = parts.driving_settings(state_dir)
        with watching(out) as watch:

            async def act(farm: Farm) -> PushResult:
                return await farm.push(ref, target, plain_http=plain_http, progress=watch)

            result = parts.acting(settings, out, "push", act)
        out.document(document(result))
        out.table(
            ("LAYER", "HOW", "UPLOADED"),
            [(short(layer.digest), layer.how, size(layer.bytes)) for layer in result.layers],
            numbers=("UPLOADED",),
        )
        out.line(f"{result.target}  {result.digest}")


def document(result: PushResult) -> documents.Pushed:
    """Return the JSON document of a push."""
    return {
        "target": result.target,
        "digest": result.digest,
        "layers": [{"digest": layer.digest, "how": layer.how, "bytes": layer.bytes} for layer in result.layers],
    }
