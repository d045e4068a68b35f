"""What the demo found, as one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number and what it had to be."""

    what: str
    value: str
    wanted: str
    ok: bool


def exactly(what: str, value: float, wanted: float, note: str = "") -> Row:
    """Return the row of a number that must be *wanted*."""
    return Row(what=what, value=f"{_shown(value)}{note}", wanted=_shown(wanted), ok=value == wanted)


def at_least(what: str, value: float, wanted: float, note: str = "") -> Row:
    """Return the row of a number that must be *wanted* or more."""
    return Row(what=what, value=f"{_shown(value)}{note}", wanted=f"≥ {_shown(wanted)}", ok=value >= wanted)


def at_most(what: str, value: float, wanted: float, note: str = "") -> Row:
    """Return the row of a number that must be *wanted* or less."""
    return Row(what=what, value=f"{_shown(value)}{note}", wanted=f"≤ {_shown(wanted)}", ok=value <= wanted)


def that(what: str, *, ok: bool, value: str, wanted: str) -> Row:
    """Return the row of a fact."""
    return Row(what=what, value=value, wanted=wanted, ok=ok)


def _shown(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def show(sections: Iterable[tuple[str, list[Row]]], console: Console) -> bool:
    """Print the table; tell whether every row is as wanted."""
    table = Table(title="lazyfarm", title_justify="left", show_lines=False, pad_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    table.add_column("wanted", justify="right")
    table.add_column("")
    everything_ok = True
    for title, rows in sections:
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in rows:
            everything_ok = everything_ok and row.ok
            table.add_row(
                f"  {escape(row.what)}",
                escape(row.value),
                row.wanted,
                "[green]ok[/green]" if row.ok else "[red]WRONG[/red]",
            )
    console.print(table)
    return everything_ok
