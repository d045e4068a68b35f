"""``lazyfarm leases``: what is kept from being collected, and until when."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import InvalidArgumentError
from cluster.lease import LeaseId
from lazyfarm.cli import completing, parts
from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.human import count, duration
from lazyfarm.cli.options import JsonOption, RefArgument, StateDirOption, command_app, example
from lazyfarm.cli.output import Output
from lazyfarm.cli.quantities import parse_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.collect.leaks import Leak
    from cluster.lease import Lease
    from lazyfarm.cli import documents
    from lazyfarm.leases import FarmLeases

app = command_app()


@app.callback(epilog=example("lazyfarm leases ls", "lazyfarm leases pin debian:12 --ttl 30d", "lazyfarm leases leaks"))
def leases() -> None:
    """List what keeps refs and blobs from being collected, pin refs, and let go of them. Ray is not joined."""


@app.command("ls", epilog=example("lazyfarm leases ls --json"))
def list_leases(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """List the live leases, with what each holds."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_records(parts.driving_settings(state_dir), lambda records: records.leases())
        out.document({"leases": [document(lease) for lease in found]})
        out.table(
            ("LEASE", "EXPIRES", "HOLDS", "LABELS"),
            [
                (
                    lease.id,
                    expiry(lease.expires_wall_s),
                    count(len(lease.resources), "resource"),
                    labels(lease),
                )
                for lease in found
            ],
        )
        out.line(count(len(found), "lease"))


@app.command("show", epilog=example("lazyfarm leases show pin-4f2a81c09be7d310"))
def show_lease(
    *,
    lease: Annotated[
        str,
        typer.Argument(metavar="LEASE", help="A lease's ID.", show_default=False, autocompletion=completing.leases),
    ],
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one lease: who made it, until when it lives, and all that it holds."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_leases(parts.driving_settings(state_dir), lambda known: known.get(LeaseId(lease)))
        out.document(document(found))
        out.fields(
            [
                ("lease", found.id),
                ("created", f"{duration(max(time.time() - found.created_wall_s, 0.0))} ago"),
                ("expires", expiry(found.expires_wall_s)),
                *(("label", f"{name}={value}") for name, value in sorted(found.labels.items())),
                *(("holds", resource) for resource in found.resources),
            ]
        )


@app.command("pin", epilog=example("lazyfarm leases pin debian:12 --ttl 30d --label why=release"))
def pin(
    *,
    ref: RefArgument,
    ttl: Annotated[
        str, typer.Option(metavar="DURATION", help="How long, as 90s, 12h or 30d. Default: until it is released.")
    ] = "",
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For people. May be given several times.")
    ] = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a ref, and all that it stands on, from being collected. A lazy ref stays lazy: nothing moves."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        ttl_s = parse_duration("--ttl", ttl) if ttl else None
        given = dict(map(_parse_label, label or ()))
        made = parts.with_leases(
            parts.driving_settings(state_dir), lambda known: known.pin_named(ref, ttl_s=ttl_s, labels=given)
        )
        out.document(document(made))
        out.line(f"{made.id}  {made.resources[0]}  {expiry(made.expires_wall_s)}")


@app.command("release", epilog=example("lazyfarm leases release pin-4f2a81c09be7d310"))
def release(
    *,
    leases: Annotated[
        list[str],
        typer.Argument(metavar="LEASE...", help="IDs of leases.", show_default=False, autocompletion=completing.leases),
    ],
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete leases. What they alone held may be collected; whoever goes on using one is told that it is lost."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:

        async def release_all(known: FarmLeases) -> None:
            for lease in leases:
                await known.release(LeaseId(lease))
                out.line(f"{lease}  released")

        parts.with_leases(parts.driving_settings(state_dir), release_all)
        out.document({"released": leases})


@app.command("leaks", epilog=example("lazyfarm leases leaks", "lazyfarm leases leaks --release"))
def leaks(
    *,
    release_them: Annotated[bool, typer.Option("--release", help="Delete the leases that are found.")] = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find leases that nobody will let go of, and such as hold only what is gone. Exit 1 if some are left."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:

        async def find(known: FarmLeases) -> list[Leak]:
            found = await known.leaks()
            if release_them:
                for leak in found:
                    await known.release(leak.lease.id)
            return found

        found = parts.with_leases(parts.driving_settings(state_dir), find)
        _tell_leaks(out, found, are_released=release_them)
        if found and not release_them:
            raise typer.Exit(EXIT_ERROR)


def _tell_leaks(out: Output, found: Sequence[Leak], *, are_released: bool) -> None:
    out.document(
        {
            "leaks": [{**document(leak.lease), "reason": leak.reason} for leak in found],
            "released": are_released,
        }
    )
    if found:
        out.table(
            ("LEASE", "HOLDS", "WHY"), [(leak.lease.id, str(len(leak.lease.resources)), leak.reason) for leak in found]
        )
    out.line(count(len(found), "leak") + (", released" if found and are_released else ""))


def document(lease: Lease) -> documents.Lease:
    """Return a lease as ``leases ls`` has it; times are wall-clock seconds, null: pinned."""
    return {
        "id": lease.id,
        "created": lease.created_wall_s,
        "expires": lease.expires_wall_s,
        "labels": lease.labels,
        "resources": list(lease.resources),
    }


def expiry(expires_wall_s: float | None) -> str:
    """Return until when, for people."""
    if expires_wall_s is None:
        return "pinned"
    left_s = expires_wall_s - time.time()
    return f"in {duration(left_s)}" if left_s > 0 else "expired"


def labels(lease: Lease) -> str:
    """Return a lease's labels, for people: ``host=a pid=7``."""
    return " ".join(f"{name}={value}" for name, value in sorted(lease.labels.items()))


def _parse_label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidArgumentError("--label", repr(text), "write it as NAME=VALUE")
    return name, value
