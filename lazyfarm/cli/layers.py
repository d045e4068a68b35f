"""Progress of layers: bars on a terminal, a line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from cluster.progress import LayerPhase, ProgressItem
from lazyfarm.cli.human import short, size
from lazyfarm.cli.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Watch: TypeAlias = Callable[[ProgressItem], None]

#: Plain output tells of each such part of a layer's bytes, not of each chunk.
_STEPS = 4


@contextmanager
def watching(out: Output) -> Iterator[Watch | None]:
    """Give what is to be told of each progress item; None where nobody looks (``--json``)."""
    if out.as_json:
        yield None
    elif out.is_live:
        with _live(out) as watch:
            yield watch
    else:
        yield PlainLayers(out)


def describe(item: ProgressItem) -> str:
    """Return what an item is: ``fetch sha256:0123456789ab``, ``extract n0 sha256:…``."""
    work, _, subject = item.item.partition(":")
    if work == "extract":
        node, _, subject = subject.partition(":")
        return f"extract {node} {short(subject)}"
    return f"{work} {short(subject)}"


class PlainLayers:
    """One line when a layer's phase changes, and one each quarter of its bytes."""

    def __init__(self, out: Output) -> None:
        self._out = out
        #: What was last said of each item.
        self._said: dict[str, tuple[LayerPhase, int]] = {}

    def __call__(self, item: ProgressItem) -> None:
        """Say what is new; items of one layer come in order, the last word is its end."""
        if not item.item:
            return
        step = 0 if item.phase.is_end else _STEPS * item.current_bytes // max(item.total_bytes, 1)
        if self._said.get(item.item) == (item.phase, step):
            return
        self._said[item.item] = (item.phase, step)
        parts = [describe(item), item.phase.value]
        if item.total_bytes and item.phase in _MOVING:
            parts.append(f"{size(item.current_bytes)} of {size(item.total_bytes)}")
        elif item.total_bytes and item.phase.is_end:
            parts.append(size(item.total_bytes))
        if item.detail:
            parts.append(" ".join(item.detail.split()))
        self._out.line("  ".join(parts))


_MOVING = frozenset({LayerPhase.FETCHING, LayerPhase.EXTRACTING})
_STYLES = {LayerPhase.FAILED: "red", LayerPhase.CANCELLED: "yellow"}


@contextmanager
def _live(out: Output) -> Iterator[Watch]:
    from rich.console import Console  # noqa: PLC0415 - 0.15 s that only a terminal is worth
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    progress = Progress(
        TextColumn("{task.description}"),
        TextColumn("[{task.fields[style]}]{task.fields[phase]:<10}[/]"),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(file=out.stdout),
    )
    with progress:
        yield LiveLayers(progress)


class LiveLayers:
    """One bar a layer, in the order in which they are first heard of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, item: ProgressItem) -> None:
        """Move the item's bar."""
        if not item.item:
            return
        task = self._tasks.get(item.item)
        if task is None:
            task = self._progress.add_task(describe(item), total=None, phase="", style="none", detail="")
            self._tasks[item.item] = task
        # A layer that was present or came with another's flight is whole, whatever this call has moved.
        is_whole = item.phase in {LayerPhase.DONE, LayerPhase.JOINED, LayerPhase.PRESENT}
        self._progress.update(
            task,
            total=item.total_bytes or None,
            completed=item.total_bytes if is_whole else item.current_bytes,
            phase=item.phase.value,
            style=_STYLES.get(item.phase, "green" if is_whole else "none"),
            detail=" ".join(item.detail.split()),
        )
