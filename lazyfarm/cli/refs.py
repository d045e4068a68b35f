"""``lazyfarm refs``: what the cache holds."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from cluster.origin import decode_origin
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.options import JsonOption, RefArgument, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.origin import Needed, Origin
    from cluster.ref import RefState
    from lazyfarm.cli import documents
    from lazyfarm.records import RefDetails

app = command_app()


@app.callback(epilog=example("lazyfarm refs ls", "lazyfarm refs show debian:12"))
def refs() -> None:
    """List refs, and show what is known of one. Reads records only: no bytes move, and Ray is not joined."""


@app.command("ls", epilog=example("lazyfarm refs ls --json"))
def list_refs(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """List every ref."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        states = parts.with_records(parts.driving_settings(state_dir), lambda records: records.refs())
        out.document({"refs": [summary(state) for state in states]})
        out.table(
            ("REF", "LAYER", "SIZE", "STATE", "DEPTH", "IMAGES"),
            [
                (
                    short(state.record.id),
                    short(state.record.blob.digest),
                    size(state.record.blob.size_bytes),
                    "lazy" if state.is_lazy else "present",
                    str(state.record.depth),
                    " ".join(state.record.image_refs),
                )
                for state in states
            ],
            numbers=("SIZE", "DEPTH"),
        )
        lazy = sum(state.is_lazy for state in states)
        out.line(f"{count(len(states), 'ref')}, {lazy} lazy")


@app.command("show", epilog=example("lazyfarm refs show debian:12"))
def show_ref(*, ref: RefArgument, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Show one ref: its record, providers, leases and state."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        details = parts.with_records(parts.driving_settings(state_dir), lambda records: records.ref(ref))
        out.document(document(details))
        record = details.state.record
        usage = details.usage
        idle_s = max(time.time() - usage.last_used_wall_s, 0.0)
        out.fields(
            [
                ("ref", record.id),
                ("state", "lazy" if details.state.is_lazy else "present"),
                ("layer", f"{record.blob.digest} ({size(record.blob.size_bytes)}, {record.blob.media_type})"),
                ("diff ID", record.blob.diff_id or ""),
                ("chain ID", record.chain),
                ("parent", record.parent or "none"),
                ("depth", str(record.depth)),
                ("images", " ".join(record.image_refs)),
                (
                    "last use",
                    f"{duration(idle_s)} ago, {count(usage.usage_count, 'use')}",
                ),
                *(("provider", handle.source) for handle in details.state.providers),
                *(("made of", _told(decode_origin(text))) for text in record.origins),
                *(("lease", str(lease)) for lease in details.leases),
            ]
        )


def summary(state: RefState) -> documents.RefSummary:
    """Return a ref as ``refs ls`` has it."""
    record = state.record
    return {
        "ref": record.id,
        "digest": record.blob.digest,
        "size": record.blob.size_bytes,
        "media_type": record.blob.media_type,
        "diff_id": record.blob.diff_id,
        "chain_id": record.chain,
        "parent": record.parent,
        "depth": record.depth,
        "lazy": state.is_lazy,
        "images": list(record.image_refs),
        "created": record.created_wall_s,
        "description": record.description,
    }


def document(details: RefDetails) -> documents.RefDetails:
    """Return the JSON document of ``refs show``."""
    state = details.state
    return {
        **summary(state),
        "state": "lazy" if state.is_lazy else "present",
        "blob": None
        if state.present is None
        else {"key": state.present.key, "etag": state.present.etag, "size": state.present.size_bytes},
        "last_used": details.usage.last_used_wall_s,
        "usage_count": details.usage.usage_count,
        "providers": [
            {
                "kind": handle.kind,
                "registry": handle.registry,
                "repository": handle.repository,
                "plain_http": handle.plain_http,
                "urls": list(handle.urls),
            }
            for handle in state.providers
        ],
        # Each is a way in: who is shown all blobs of one, and may use what is below, may have it. None: it was pulled.
        "made_of": [
            [{"digest": need.digest, "size": need.size_bytes, "source": _source(need)} for need in origin]
            for origin in map(decode_origin, state.record.origins)
        ],
        "leases": list(details.leases),
        # Images that it is the top of; `images` names those that it is a layer of.
        "tops": [image.name for image in details.images],
        "layers": [
            {
                "digest": layer.record.blob.digest,
                "size": layer.record.blob.size_bytes,
                "lazy": layer.is_lazy,
                "ref": layer.record.id,
            }
            for layer in details.chain
        ],
    }


def _told(origin: Origin) -> str:
    """Say what a layer was made of besides what it is on, by where that is."""
    sources = Counter(map(_source, origin))
    return ", ".join(f"{count(number, 'blob')} of {source}" for source, number in sorted(sources.items())) or (
        "nothing that needs another's access"
    )


def _source(need: Needed) -> str:
    return need.came_from or next((handle.source for handle in need.providers), "an unknown place")
