"""Rounds: work that goes through all there is, bit by bit, and again after a while; a restart goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How far one has come."""

    began_wall_s: float
    #: Name of the last thing that was looked at; they go by their order. "": none yet.
    after: str = ""
    is_done: bool = False


def due_round(last: Round | None, *, now_wall_s: float, every_s: float) -> Round | None:
    """Return the round to go on with, or to begin; None where the next one isn't due yet.

    Args:
        last: The one before; None: never.
        now_wall_s: Seconds, by the clock that rounds are told by.
        every_s: Between the beginnings of two rounds.
    """
    if last is None or (last.is_done and last.began_wall_s + every_s <= now_wall_s):
        return Round(began_wall_s=now_wall_s)
    return None if last.is_done else last
