"""What a notebook shows of a ref or a result: a small table, everything in it escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from cluster.ref import RefState
from lazyfarm.cli.human import short, size


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def layers_table(title: str, layers: Sequence[RefState]) -> str:
    """Return a chain's layers, lowest first, under a title."""
    lazy = sum(state.is_lazy for state in layers)
    shown = table(
        ("layer", "size", "state", "ref"),
        [
            (
                short(state.record.blob.digest),
                size(state.record.blob.size_bytes),
                "lazy" if state.is_lazy else "present",
                short(state.record.id),
            )
            for state in layers
        ],
    )
    return f"<p><b>{escape(title)}</b>: {len(layers)} layers, {lazy} lazy</p>{shown}"
