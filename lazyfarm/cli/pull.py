"""``lazyfarm pull``: an image becomes lazy refs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.reference import parse_platform, parse_reference
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, short, size
from lazyfarm.cli.layers import watching
from lazyfarm.cli.options import JsonOption, PlainHttpOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from lazyfarm.cli import documents
    from lazyfarm.farm import Farm
    from lazyfarm.ref import Ref

app = command_app()


@app.command(
    epilog=example("lazyfarm pull debian:12", "lazyfarm pull --platform linux/arm64 ghcr.io/owner/app@sha256:…")
)
def pull(
    *,
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]", show_default=False)
    ],
    platform: Annotated[
        str | None,
        typer.Option("--platform", metavar="OS/ARCH[/VARIANT]", help="Default: this machine's.", show_default=False),
    ] = None,
    plain_http: PlainHttpOption = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an image known, without its layers: manifest and config are read, refs are made, no layer moves."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        # Said at once, not after joining the cluster.
        parse_reference(image)
        if platform is not None:
            parse_platform(platform)
        settings = parts.driving_settings(state_dir)
        with watching(out) as watch:

            async def act(farm: Farm) -> Ref:
                return await farm.pull(image, platform=platform, plain_http=plain_http, progress=watch)

            ref = parts.acting(settings, out, "pull", act)
        out.document(document(ref))
        out.table(
            ("LAYER", "SIZE", "STATE", "REF"),
            [
                (
                    short(layer.record.blob.digest),
                    size(layer.record.blob.size_bytes),
                    state_of(layer.is_lazy),
                    short(layer.record.id),
                )
                for layer in ref.layers
            ],
            numbers=("SIZE",),
        )
        total_bytes = sum(layer.record.blob.size_bytes for layer in ref.layers)
        lazy = sum(layer.is_lazy for layer in ref.layers)
        out.line(f"{ref.image}  {ref.digest}")
        out.line(f"ref {ref.id}: {count(len(ref.layers), 'layer')}, {lazy} lazy, {size(total_bytes)}")


def document(ref: Ref) -> documents.Pulled:
    """Return the JSON document of a pulled image."""
    return {
        "ref": ref.id,
        "image": ref.image,
        "digest": ref.digest,
        "layers": [
            {
                "digest": layer.record.blob.digest,
                "size": layer.record.blob.size_bytes,
                "lazy": layer.is_lazy,
                "ref": layer.record.id,
            }
            for layer in ref.layers
        ],
    }


def state_of(is_lazy: bool) -> str:  # noqa: FBT001 - the one thing it is about
    """Return a ref's state as tables show it."""
    return "lazy" if is_lazy else "present"
