"""Ray's errors in a line: their messages are pages, of which the telling lines are neither first nor last."""

from __future__ import annotations

import ray.exceptions


def telling(error: ray.exceptions.RayError) -> str:
    """Return what is to be known of *error*, in one line, and without the actor's particulars."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return "it does not answer"
    # Indented lines are particulars: class_name, actor_id, pid, ip.
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    # The first says that it died, the second why.
    return " ".join(lines[:2]) or type(error).__name__
