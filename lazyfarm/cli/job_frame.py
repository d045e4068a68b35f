"""One frame of a build's display, for any width and height. Imported only where there is a terminal: it needs rich."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from cluster.job import JobEvent, JobState, VertexState
from cluster.progress import LayerPhase
from lazyfarm.cli.human import count, short, size
from lazyfarm.cli.job_view import JobView, LayerView, VertexView, read_error, repeat
from lazyfarm.cli.terminal import one_line, visible

#: Columns that the longest seconds take, with a space before them.
_SECONDS_WIDTH = 8
_BAR_WIDTH = 16
#: A terminal narrower than this gets no bars.
_BAR_FROM_WIDTH = 70
#: How many lines of what it says, and how many layers, are shown of a vertex: as much as there is room for.
_DETAILS = ((6, 8), (3, 4), (1, 2), (0, 0))
#: Seconds after which events are no longer taken for old ones that are replayed.
_REPLAY_S = 2.0

_STYLES = {
    VertexState.CACHED: "blue",
    VertexState.COMPLETED: "blue",
    VertexState.FAILED: "red",
    VertexState.CANCELLED: "yellow",
}
_MARKS = {VertexState.CACHED: "CACHED ", VertexState.FAILED: "ERROR ", VertexState.CANCELLED: "CANCELED "}
_ENDINGS = {JobState.DONE: " FINISHED", JobState.FAILED: " FAILED", JobState.CANCELLED: " CANCELED"}
_WHOLE = frozenset({LayerPhase.DONE, LayerPhase.JOINED})


class StoreTime:
    """The store's clock, as far as it can be told from when events came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        #: This clock is ahead of the store's by that, at most; None: nothing is known.
        self._ahead_s: float | None = None

    def hear(self, wall_s: float) -> None:
        """Take it that an event was told at *wall_s*."""
        now_s = self._clock()
        # What is replayed may be of any age. What says that the store's clock is ahead says so at any age.
        if wall_s > now_s or now_s - self._began_s > _REPLAY_S:
            ahead_s = now_s - wall_s
            self._ahead_s = ahead_s if self._ahead_s is None else min(self._ahead_s, ahead_s)

    def now_wall_s(self) -> float:
        """Return what time it is there."""
        return self._clock() - (self._ahead_s or 0.0)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a frame: cut where it is too long, and its seconds at the right edge."""

    text: str
    style: str = ""
    seconds: float | None = None

    def render(self, width: int) -> Text:
        right = "" if self.seconds is None else f"{self.seconds:.1f}s"
        room = width - (_SECONDS_WIDTH if right else 0)
        text = Text(self.text, style=self.style, no_wrap=True, end="")
        text.truncate(max(room, 1), overflow="ellipsis", pad=bool(right))
        text.append(right.rjust(_SECONDS_WIDTH) if right else "")
        if width < _SECONDS_WIDTH * 2:
            text.truncate(width)
        return text


class JobFrame:
    """A rich renderable: a job as its events left it, at the time when it is drawn. Events and drawing may race."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing.

        Args:
            clock: Wall-clock seconds of this machine.
        """
        self._view = JobView()
        self._time = StoreTime(clock)
        #: Between the thread that draws and the one that hears of events.
        self._lock = threading.Lock()
        self._is_final = False

    def handle(self, event: JobEvent) -> None:
        """Take an event."""
        with self._lock:
            self._time.hear(event.wall_s)
            self._view.handle(event)

    def finish(self) -> None:
        """Draw all there is from now on, whatever the height."""
        with self._lock:
            self._is_final = True

    def epilogue(self) -> list[str]:
        """Return what comes below the last frame."""
        with self._lock:
            has_failed = self._view.failed is not None and self._view.end is not None
            failure = repeat(self._view.failed) if has_failed and self._view.failed else []
            return [*(f"WARNING: {one_line(text)}" for text in self._view.warnings), *failure]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw."""
        # The last column and row are left free: some terminals wrap, or scroll, at these.
        width = max(options.max_width - 1, 1)
        height = max((options.height or console.size.height) - 1, 3)
        with self._lock:
            lines = self._lines(None if self._is_final else height, width)
        for index, line in enumerate(lines):
            if index:
                yield Text("\n", end="")
            yield line.render(width)

    # -- layout ---------------------------------------------------------------------------------------------

    def _lines(self, height: int | None, width: int) -> list[_Line]:
        """Return the frame's lines; at most *height*, where that is given."""
        now_s = self._now_s()
        vertices = self._view.listed
        header = self._header(now_s)
        if height is None:
            whole = [line for vertex in vertices for line in self._block(vertex, now_s, width, *_DETAILS[0])]
            return [header, *whole]
        for logs, layers in _DETAILS:
            blocks = [self._block(vertex, now_s, width, logs, layers) for vertex in vertices]
            active = sum(len(block) for vertex, block in zip(vertices, blocks, strict=True) if vertex.is_busy)
            if active <= height - 2 or (logs, layers) == _DETAILS[-1]:
                break
        return [header, *_fit(vertices, blocks, height - 1)]

    def _now_s(self) -> float:
        if self._view.end is not None:
            return self._view.end.wall_s
        return max(self._time.now_wall_s(), self._view.last_wall_s)

    def _header(self, now_s: float) -> _Line:
        view = self._view
        seconds = 0.0 if view.began_wall_s is None else max(now_s - view.began_wall_s, 0.0)
        ending = _ENDINGS[view.end.state] if view.end is not None and view.end.state in _ENDINGS else ""
        return _Line(f"[+] Building {seconds:.1f}s ({view.done}/{len(view.vertices)}){ending}")

    def _block(self, vertex: VertexView, now_s: float, width: int, logs: int, layers: int) -> list[_Line]:
        """Return a vertex's lines."""
        is_going = vertex.is_busy and self._view.end is None
        style = "" if is_going else _STYLES.get(vertex.state, "")
        seconds = vertex.busy_s(now_s)
        lines = [_Line(f" => {_MARKS.get(vertex.state, '')}{vertex.label}", style, seconds)]
        if not is_going:
            return lines + _summary(vertex)
        shown = _moving(vertex)
        lines += [_layer_line(group, now_s, width) for group in shown[:layers]]
        if len(shown) > layers > 0:
            lines.append(_Line(f" => => and {count(len(shown) - layers, 'more layer')}", "dim"))
        if vertex.state is VertexState.RUNNING and logs:
            said = [visible(line.text).expandtabs() for line in vertex.tail]
            lines += [_Line(f" => => # {line}", "dim") for line in said[-logs:]]
        return lines


def _fit(vertices: list[VertexView], blocks: list[list[_Line]], room: int) -> list[_Line]:
    """Return what of the blocks there is room for: what is busy whole, of the rest the last ones."""
    chosen: list[list[_Line]] = [
        block if vertex.is_busy else [] for vertex, block in zip(vertices, blocks, strict=True)
    ]
    used = sum(len(block) for block in chosen)
    quiet = [index for index, vertex in enumerate(vertices) if not vertex.is_busy]
    is_all = used + sum(len(blocks[index]) for index in quiet) <= room
    hidden = len(quiet)
    for index in reversed(quiet):
        # A line is kept for telling of those that are hidden.
        fitting = blocks[index] if is_all else blocks[index][:1]
        if used + len(fitting) > (room if is_all else room - 1):
            break
        chosen[index] = fitting
        used += len(fitting)
        hidden -= 1
    lines = [line for block in chosen for line in block]
    if hidden and used < room:
        lines.insert(0, _Line(f" => … {count(hidden, 'step')} before that", "dim"))
    if len(lines) > room:
        left = len(lines) - room + 1
        return [*lines[: room - 1], _Line(f" => … and {count(left, 'more line')}", "dim")]
    return lines


# -- layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """What is done to one layer, on however many nodes."""

    label: str
    current_bytes: int
    total_bytes: int
    began_wall_s: float
    is_waiting: bool


def _moving(vertex: VertexView) -> list[_Group]:
    """Return what moves for a vertex; a layer that is extracted on several nodes once."""
    groups: dict[tuple[str, str], list[LayerView]] = {}
    for layer in vertex.layers.values():
        if layer.item.phase is not LayerPhase.PRESENT:
            groups.setdefault((layer.work, layer.subject), []).append(layer)
    moving = [group for group in groups.values() if any(layer.is_moving for layer in group)]
    found = [_grouped(group) for group in moving]
    return sorted(found, key=lambda group: group.is_waiting)  # stable: what only waits comes last


def _grouped(layers: list[LayerView]) -> _Group:
    first = layers[0]
    label = short(first.subject)
    if first.work == "extract":
        where = first.node if len(layers) == 1 else f"{len(layers)} nodes"
        label = f"extract {label.removeprefix('sha256:')} {where}"
    elif first.work != "fetch":
        label = f"{first.work} {label.removeprefix('sha256:')}"
    return _Group(
        label=label,
        current_bytes=sum(_current(layer) for layer in layers),
        total_bytes=sum(layer.item.total_bytes for layer in layers),
        began_wall_s=min(layer.began_wall_s for layer in layers if layer.is_moving),
        is_waiting=all(layer.item.phase is LayerPhase.WAITING for layer in layers if layer.is_moving),
    )


def _current(layer: LayerView) -> int:
    return layer.item.total_bytes if layer.item.phase in _WHOLE else layer.item.current_bytes


def _layer_line(group: _Group, now_s: float, width: int) -> _Line:
    if group.is_waiting:
        return _Line(f" => => {group.label:<28} waiting", "dim")
    text = f" => => {group.label:<28}"
    if group.total_bytes:
        part = min(group.current_bytes / group.total_bytes, 1.0)
        if width >= _BAR_FROM_WIDTH - 1:
            filled = int(part * _BAR_WIDTH)
            text += f" {'━' * filled}{'─' * (_BAR_WIDTH - filled)}"
        text += f" {_of(group.current_bytes, group.total_bytes)}"
    elif group.current_bytes:
        text += f" {size(group.current_bytes)}"
    return _Line(text, "", max(now_s - group.began_wall_s, 0.0))


def _of(current_bytes: int, total_bytes: int) -> str:
    """Return ``3.1/12.0 MiB``, in one unit where both have it."""
    current, total = size(current_bytes), size(total_bytes)
    number, _, unit = current.partition(" ")
    return f"{number}/{total}" if total.endswith(f" {unit}") else f"{current}/{total}"


def _summary(vertex: VertexView) -> list[_Line]:
    """Return what is left to say of a vertex's layers, and of why it failed, once nothing moves any more."""
    lines = []
    fetched = [layer for layer in vertex.layers.values() if layer.work == "fetch" and layer.item.phase in _WHOLE]
    extracted = {
        layer.subject
        for layer in vertex.layers.values()
        if layer.work == "extract" and layer.item.phase is LayerPhase.DONE
    }
    words = []
    if fetched:
        total_bytes = sum(layer.item.total_bytes for layer in fetched)
        words.append(f"{count(len(fetched), 'layer')} fetched ({size(total_bytes)})")
    if extracted:
        words.append(f"{count(len(extracted), 'layer')} extracted")
    if words:
        lines.append(_Line(f" => => {', '.join(words)}", "blue"))
    if vertex.state is VertexState.FAILED and not vertex.tail:
        lines.append(_Line(f" => => {one_line(str(read_error(vertex.error) or 'unknown'))}", "red"))
    return lines
