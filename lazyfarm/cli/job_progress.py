"""Progress of builds: a frame that redraws itself, lines, or JSON, from a job's events.

What people see is in the manner of BuildKit's ``--progress``; the documents are in ``docs/progress.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

import typer

from cluster.job import (
    JobEnded,
    JobEvent,
    JobWarning,
    VertexEvent,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    VertexState,
)
from cluster.progress import LayerPhase
from lazyfarm.cli.human import short, size
from lazyfarm.cli.job_view import (
    JobView,
    LayerView,
    LogLine,
    VertexView,
    at,
    read_error,
    repeat,
    split_item,
)
from lazyfarm.cli.output import Output
from lazyfarm.cli.terminal import one_line, visible, wants_colours

if TYPE_CHECKING:
    from lazyfarm.cli import documents
    from lazyfarm.cli.job_frame import JobFrame

MODES = ("auto", "plain", "tty", "json")
#: Plain output tells of each such part of a layer's bytes, not of each chunk.
_STEPS = 4
#: Frames a second.
_REFRESH_HZ = 8.0


class JobProgress(Protocol):
    """Shows a job's events, in the order of its stream."""

    def __call__(self, event: JobEvent) -> None:
        """Show an event."""
        ...

    def close(self) -> None:
        """Show what is left to show: nothing more comes, whether the job has ended or not."""
        ...


def check_mode(mode: str, *, as_json: bool) -> None:
    """Refuse a ``--progress`` that can't be, as wrong usage.

    Raises:
        typer.BadParameter: there is no such mode, or it contradicts ``--json``.
    """
    if mode not in MODES:
        raise typer.BadParameter(f"--progress is {mode!r}, not one of {', '.join(MODES)}")
    if as_json and mode == "json":
        raise typer.BadParameter("--json prints one document, --progress json one for each event: give one of them")


@contextmanager
def showing(out: Output, mode: str) -> Iterator[Callable[[JobEvent], None] | None]:
    """Give what is to be told of each event of a job; None where nobody looks.

    Args:
        out: Where to. With ``--json`` only a mode that is asked for shows anything, on stderr.
        mode: One of :data:`MODES`.
    """
    if out.as_json and mode == "auto":
        yield None
        return
    stream = out.stderr if out.as_json else out.stdout
    progress = _progress(stream, mode)
    try:
        yield progress
    finally:
        progress.close()


def _progress(stream: TextIO, mode: str) -> JobProgress:
    if mode == "json":
        return JsonProgress(stream)
    if mode == "tty" or (mode == "auto" and stream.isatty()):
        return LiveProgress(stream)
    return PlainProgress(stream)


# -- documents ------------------------------------------------------------------------------------------


class JsonProgress:
    """One JSON object a line for each event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: JobEvent) -> None:
        """Print the event."""
        self._stream.write(json.dumps(document(event), ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left to show."""


def document(event: JobEvent) -> dict[str, object]:
    """Return an event's JSON document; times are wall-clock seconds of the farm's store."""
    match event:
        case VertexEvent():
            told = {"event": "vertex", "vertex": event.vertex, "name": event.name, "state": event.state.value}
            return {
                **told,
                **({"node": event.node} if event.node else {}),
                **_failure(event.error),
                "time": event.wall_s,
            }
        case VertexLog():
            told = {"event": "log", "vertex": event.vertex, "stream": event.stream.value, "text": event.text}
            return {**told, "time": event.wall_s}
        case VertexLogDropped():
            return {"event": "log-dropped", "vertex": event.vertex, "time": event.wall_s}
        case VertexLayers(item=item):
            work, node, subject = split_item(item.item)
            return {
                "event": "layer",
                "vertex": event.vertex,
                "work": work,
                "digest": subject,
                **({"node": node} if node else {}),
                "phase": item.phase.value,
                "current": item.current_bytes,
                "total": item.total_bytes,
                **({"detail": item.detail} if item.detail else {}),
                "time": event.wall_s,
            }
        case JobWarning():
            return {"event": "warning", "text": event.text, "time": event.wall_s}
        case JobEnded():
            return {"event": "end", "state": event.state.value, **_failure(event.error), "time": event.wall_s}


def error_document(payload: bytes) -> documents.Problem | None:
    """Return the JSON document of an error, as all commands have it; None where there is none."""
    error = read_error(payload)
    if error is None:
        return None
    return {"type": type(error).__name__, "message": str(error), "hint": error.hint}


def _failure(payload: bytes) -> Mapping[str, object]:
    told = error_document(payload)
    return {} if told is None else {"failure": told}


# -- lines ----------------------------------------------------------------------------------------------


class PlainProgress:
    """A line for each thing that happens, with the number of its vertex: for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colours = wants_colours(stream)
        self._view = JobView()
        #: Vertices whose name was said.
        self._named: set[int] = set()
        #: What was last said of each layer of each vertex.
        self._said: dict[tuple[int, str], tuple[LayerPhase, int]] = {}

    def __call__(self, event: JobEvent) -> None:
        """Say what is new."""
        before = self._state(event)
        lines = self._view.handle(event)
        if isinstance(event, JobEnded):
            self._end()
        elif isinstance(event, JobWarning):
            self._stream.write(f"\nWARNING: {one_line(event.text)}\n")
        else:
            self._tell(self._view.vertices[event.vertex], event, before, lines)
        self._stream.flush()

    def close(self) -> None:
        """Say what was said without a newline at its end."""
        for vertex in self._view.listed:
            for line in vertex.end_logs():
                self._log(vertex, line)
        self._stream.flush()

    def _state(self, event: JobEvent) -> VertexState | None:
        known = None if isinstance(event, JobEnded | JobWarning) else self._view.vertices.get(event.vertex)
        return None if known is None else known.state

    def _tell(self, vertex: VertexView, event: JobEvent, before: VertexState | None, lines: list[LogLine]) -> None:
        if not vertex.number:
            return
        if vertex.number not in self._named and vertex.name:
            self._named.add(vertex.number)
            self._stream.write(f"\n#{vertex.number} {vertex.label}\n" if vertex.number > 1 else f"#1 {vertex.label}\n")
        for line in lines:
            self._log(vertex, line)
        match event:
            case VertexEvent() if vertex.state.is_end and vertex.state is not before:
                self._say(vertex, self._ending(vertex, event.wall_s))
            case VertexLogDropped():
                self._say(vertex, "[the job has said more than is kept: lines are missing from here on]")
            case VertexLayers():
                self._layer(vertex, vertex.layers[event.item.item], event.wall_s)
            case _:
                pass

    def _log(self, vertex: VertexView, line: LogLine) -> None:
        self._say(vertex, f"{at(line.at_s)} {visible(line.text, colours=self._colours)}")

    def _say(self, vertex: VertexView, text: str) -> None:
        self._stream.write(f"#{vertex.number} {text}\n")

    def _ending(self, vertex: VertexView, now_wall_s: float) -> str:
        match vertex.state:
            case VertexState.CACHED:
                return "CACHED"
            case VertexState.CANCELLED:
                return "CANCELED"
            case VertexState.FAILED:
                return f"ERROR: {one_line(str(read_error(vertex.error) or 'unknown'))}"
            case _:
                return f"DONE {vertex.busy_s(now_wall_s):.1f}s"

    def _layer(self, vertex: VertexView, layer: LayerView, now_wall_s: float) -> None:
        item = layer.item
        if item.phase in (LayerPhase.WAITING, LayerPhase.PRESENT):
            return
        step = 0 if item.phase.is_end else _STEPS * item.current_bytes // max(item.total_bytes, 1)
        if self._said.get((vertex.number, item.item)) == (item.phase, step):
            return
        self._said[vertex.number, item.item] = (item.phase, step)
        words = [describe(layer)]
        if item.total_bytes:
            moved = f"{size(item.current_bytes)} / " if not item.phase.is_end else ""
            words.append(f"{moved}{size(item.total_bytes)}")
        if item.phase.is_end:
            words.append(item.phase.value)
        words.append(f"{now_wall_s - layer.began_wall_s:.1f}s")
        if item.phase is LayerPhase.FAILED and item.detail:
            words.append(one_line(item.detail))
        self._say(vertex, " ".join(words))

    def _end(self) -> None:
        self.close()
        if (failed := self._view.failed) is not None:
            self._stream.writelines(f"{line}\n" for line in repeat(failed))


def describe(layer: LayerView) -> str:
    """Return what is done to a layer: ``sha256:0123456789ab``, ``extracting sha256:… on n0``."""
    match layer.work:
        case "fetch":
            return short(layer.subject)
        case "extract":
            return f"extracting {short(layer.subject)} on {layer.node}"
        case _:
            return f"{layer.work} {short(layer.subject)}"


# -- a frame that redraws itself --------------------------------------------------------------------------


class LiveProgress:
    """BuildKit's display: what runs, with its layers and last lines; what is done, a line each.

    Redraws itself some times a second from a thread of its own. Where the stream is no terminal, only the last frame
    is printed.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415 - 0.15 s that only a terminal is worth
        from rich.live import Live  # noqa: PLC0415 - likewise

        from lazyfarm.cli.job_frame import JobFrame  # noqa: PLC0415 - likewise

        self._stream = stream
        self._frame: JobFrame = JobFrame(time.time)
        self._console = Console(file=stream, highlight=False, markup=False)
        self._live = Live(self._frame, console=self._console, refresh_per_second=_REFRESH_HZ)
        self._live.start()

    def __call__(self, event: JobEvent) -> None:
        """Take the event; the next frame shows it."""
        self._frame.handle(event)

    def close(self) -> None:
        """Leave a last frame, whole, and what a vertex said that failed."""
        self._frame.finish()
        self._live.stop()
        if not self._console.is_terminal:
            self._stream.write("\n")  # rich ends the frame's last line on terminals only
        self._stream.writelines(f"{line}\n" for line in self._frame.epilogue())
        self._stream.flush()
