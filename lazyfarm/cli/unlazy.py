"""``lazyfarm unlazy``: the layers of a ref get into the content store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.layers import watching
from lazyfarm.cli.options import JsonOption, RefArgument, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.messages import UnlazyResult
    from lazyfarm.cli import documents
    from lazyfarm.farm import Farm

app = command_app()


@app.command(epilog=example("lazyfarm unlazy debian:12"))
def unlazy(*, ref: RefArgument, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Make sure that a ref's layers are in the content store, each fetched once for the whole cluster.

    A layer that is there is not fetched again; one that another call is fetching is joined.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        with watching(out) as watch:

            async def act(farm: Farm) -> UnlazyResult:
                return await (await farm.get(ref)).unlazy(progress=watch)

            result = parts.acting(settings, out, "unlazy", act)
        out.document(document(result))
        out.table(
            ("LAYER", "HOW", "FETCHED", "TIME", "SOURCE"),
            [
                (
                    short(layer.digest),
                    "joined" if layer.joined else "present" if layer.source == "present" else "fetched",
                    size(layer.bytes_fetched),
                    duration(layer.seconds),
                    layer.source,
                )
                for layer in result.layers
            ],
            numbers=("FETCHED", "TIME"),
        )
        fetched = sum(layer.bytes_fetched for layer in result.layers)
        out.line(
            f"ref {result.ref_id}: {count(len(result.layers), 'layer')} present, {size(fetched)} fetched by this call"
        )


def document(result: UnlazyResult) -> documents.Unlazied:
    """Return the JSON document of an unlazy."""
    return {
        "ref": result.ref_id,
        "layers": [
            {
                "digest": layer.digest,
                "source": layer.source,
                "bytes": layer.bytes_fetched,
                "seconds": layer.seconds,
                "joined": layer.joined,
            }
            for layer in result.layers
        ],
    }
