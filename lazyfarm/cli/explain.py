"""``lazyfarm explain``: why things are as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.job import VertexState
from lazyfarm.cli import completing, parts
from lazyfarm.cli.audit_lines import audit_document, audit_line, story_lines
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.leases import document as lease_document
from lazyfarm.cli.leases import expiry, labels
from lazyfarm.cli.options import JsonOption, RefArgument, StateDirOption, command_app, example

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.collect.stock import Hold
    from lazyfarm.cli import documents
    from lazyfarm.explain import LayerStory, LayerWait
    from lazyfarm.miss import Miss

app = command_app()

LayerArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIGEST|REF",
        help="A blob's digest, a ref, or an image.",
        show_default=False,
        autocompletion=completing.refs,
    ),
]


@app.callback(epilog=example("lazyfarm explain pull debian:12", "lazyfarm explain kept debian:12"))
def explain() -> None:
    """Say why things are as they are. Reads records only: Ray is not joined."""


@app.command("wait", epilog=example("lazyfarm explain wait debian:12", "lazyfarm explain wait sha256:3ab1…"))
def wait(
    *,
    name: LayerArgument,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whom a layer waits for: who fetches it, how fast, how long it will take, and who else waits."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_explain(parts.driving_settings(state_dir), lambda farm: farm.wait(name))
        out.document({"layers": [_document(layer) for layer in found]})
        for layer in found:
            out.line(f"{short(layer.digest)}  {_told(layer)}")
            for waiting in layer.asked_by:
                out.line(f"  for vertex {short(waiting.vertex)} of job {waiting.job}")


@app.command("pull", epilog=example("lazyfarm explain pull debian:12", "lazyfarm explain pull sha256:3ab1…"))
def pull(
    *,
    name: LayerArgument,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how a layer came here, or why it has not: who asked, who fetched it, from where, as whom, how fast.

    Told of the audit stream, as far back as that goes; `lazyfarm audit --digest` has all of it.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_explain(parts.driving_settings(state_dir), lambda farm: farm.pull(name))
        out.document(
            {
                "pulls": [audit_document(entry) for entry in found.pulls],
                "layers": [_story_document(layer) for layer in found.layers],
            }
        )
        for entry in found.pulls:
            out.line(audit_line(entry))
        for layer in found.layers:
            out.line(f"{short(layer.digest)}  {_arrival(layer)}")
            for line in story_lines(layer.entries):
                out.line(f"  {line}")


def _arrival(layer: LayerStory) -> str:
    """Return in words where a layer is, and how it got there."""
    if layer.wait.state == "present":
        came = next((entry for entry in reversed(layer.attempts) if entry.fence == layer.fence), None)
        told = [f"present, {size(layer.wait.total_bytes)}"]
        told.append(f"from {layer.came_from}" if layer.came_from else "made or put together here")
        if came is not None and came.moved_bytes:
            told.append(f"in {duration(came.seconds)} ({size(came.rate)}/s)")
        owners = len({entry.fence for entry in layer.attempts})
        if owners > 1:
            told.append(f"by the {count(owners, 'owner')}, one after the other")
        joined = sum(entry.outcome == "joined" for entry in layer.asked)
        if joined:
            told.append(f"{joined} of {count(len(layer.asked), 'caller')} joined")
        return ", ".join(told)
    if layer.wait.state == "gone":
        return "gone: nothing has it any more"
    if layer.wait.state != "lazy":
        return _told(layer.wait)
    if failed := [entry for entry in layer.attempts if entry.outcome == "failed"]:
        why = f"the last try failed ({failed[-1].error})"
    else:
        why = "whoever asked for it gave up" if layer.asked else "nobody has needed its bytes"
    return f"lazy: {why}" + (f"; it would come from {' or '.join(layer.providers)}" if layer.providers else "")


def _story_document(layer: LayerStory) -> documents.LayerStory:
    return {
        **_document(layer.wait),
        "came_from": layer.came_from or None,
        "fence": layer.fence or None,
        "providers": [*layer.providers],
        "asked": [audit_document(entry) for entry in layer.asked],
        "attempts": [audit_document(entry) for entry in layer.attempts],
        "others": [audit_document(entry) for entry in layer.others],
    }


@app.command("miss", epilog=example("lazyfarm explain miss 'RUN make'", "lazyfarm explain miss 81ff --job 4f2a"))
def miss(
    *,
    step: Annotated[
        str,
        typer.Argument(metavar="STEP", help="Part of a step's name, or how its digest begins.", show_default=False),
    ],
    job: Annotated[
        str,
        typer.Option(
            "--job", metavar="JOB", help="Default: the newest.", show_default=False, autocompletion=completing.jobs
        ),
    ] = "",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="JOB",
            help="Compare with this earlier one. Default: the nearest.",
            autocompletion=completing.jobs,
        ),
    ] = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why a step of a build was not found in the cache: what differs from the nearest build that had it.

    The lowest step that differs comes first: what stands on it differs by that alone.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        found = parts.with_explain(settings, lambda farm: farm.miss(step, job=job, against=against))
        out.document(_miss_document(found))
        state = found.state.value if found.state else "not begun"
        out.line(f"{found.name or short(found.vertex)} of job {found.job}: {state}")
        for line in _reasons(found):
            out.line(line)


def _reasons(found: Miss) -> Iterator[str]:
    """Yield, in words, why a step was run."""
    if found.state is VertexState.CACHED:
        yield "it was found in the cache"
        return
    if found.is_fresh:
        yield "the job was told to run it afresh (--no-cache)"
        return
    if found.nearest is None:
        yield "no job of the last week had a step of that name: nothing to compare with"
        return
    yield f"against job {found.nearest}:"
    for differs in found.differs:
        change = differs.change
        yield f"  {change.name or short(change.vertex)}"
        if change.trees is None:
            yield f"    {change.what}: {change.before} -> {change.now}"
            continue
        yield "    the directory has other content" + ("" if differs.files else " (what, is not known any more)")
        yield from (f"      {file}" for file in differs.files)
        if differs.more_files:
            yield f"      and {count(differs.more_files, 'more path')}"
    if not found.differs:
        yield "  the graph is the same: its result was collected, or never came to be"
        if found.images:
            yield f"  or an image has moved: {', '.join(found.images)}"


def _miss_document(found: Miss) -> documents.Miss:
    return {
        "job": found.job,
        "vertex": found.vertex,
        "name": found.name,
        "state": found.state.value if found.state else None,
        "fresh": found.is_fresh,
        "against": found.nearest,
        "differs": [
            {
                "vertex": differs.change.vertex,
                "name": differs.change.name,
                "what": differs.change.what,
                "before": differs.change.before,
                "now": differs.change.now,
                "files": [*differs.files],
                "more_files": differs.more_files,
            }
            for differs in found.differs
        ],
        "images": [*found.images],
    }


@app.command("kept", epilog=example("lazyfarm explain kept debian:12"))
def kept(*, ref: RefArgument, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Say what keeps a ref from being collected: which lease, of whom and until when, and what stands on it."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.kept(parts.driving_settings(state_dir), ref)
        out.document(
            {
                "ref": found.ref,
                "holds": [
                    {"lease": lease_document(hold.lease), "ref": hold.ref, "image": hold.image or None}
                    for hold in found.holds
                ],
                "children": list(found.children),
            }
        )
        for hold in found.holds:
            out.line(_held(hold, found.ref))
        for child in found.children:
            out.line(f"{short(child)} stands on it")
        if not found.holds:
            stays = "nothing holds it" + (", nor what stands on it" if found.children else "")
            out.line(f"{stays}: it goes with the next collection whose policy lets it go")


def _held(hold: Hold, ref_id: str) -> str:
    """Return one reason, in words: ``lease driver-1 (host=a pid=7) holds it, expires in 42 s``."""
    told = labels(hold.lease)
    held = "it" if hold.ref == ref_id else f"{short(hold.ref)}, which stands on it"
    held = f"{hold.image}, whose top is {held}" if hold.image else held
    until = expiry(hold.lease.expires_wall_s)
    ends = "has no expiry" if hold.lease.expires_wall_s is None else f"expires {until}"
    return f"lease {hold.lease.id}{f' ({told})' if told else ''} holds {held}, {ends}"


def _told(layer: LayerWait) -> str:
    if layer.state == "present":
        return f"present, {size(layer.total_bytes)}: waits for nothing"
    if layer.state == "lazy":
        return "lazy: nobody fetches it"
    told = [f"{layer.state} by {layer.owner}", f"{size(layer.current_bytes)} of {size(layer.total_bytes)}"]
    told.append(f"{size(layer.rate)}/s" if layer.rate else "nothing came while this looked")
    if layer.left_s is not None:
        told.append(f"{duration(layer.left_s)} left")
    told.append(f"{count(layer.waiters, 'worker')} waiting")
    told.append(f"another takes over in {duration(layer.lease_left_s)} if it dies")
    return ", ".join(told)


def _document(layer: LayerWait) -> documents.LayerWait:
    return {
        "digest": layer.digest,
        "state": layer.state,
        "owner": layer.owner or None,
        "current": layer.current_bytes,
        "total": layer.total_bytes,
        "rate": layer.rate,
        "left": layer.left_s,
        "lease_left": layer.lease_left_s,
        "waiters": layer.waiters,
        "asked_by": [{"job": waiting.job, "vertex": waiting.vertex} for waiting in layer.asked_by],
    }
