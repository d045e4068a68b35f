"""Finds leases that hold what nobody will let go of, or hold nothing at all.

A lease ends with who holds it: whoever is there renews it, and who died stops. What is left to go wrong are leases
without an expiry, leases of something that ended otherwise, and holds on what is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.lease import Lease

#: Seconds after its creation for which a lease is not judged: what it is for may not be recorded yet.
_NEW_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnesses:
    """What is there, as far as leases speak of it."""

    #: Digests of the manifests that images have.
    manifests: frozenset[str]
    #: Job to when it ended, wall-clock seconds; None: it goes on. Those that are missing are not known any more.
    jobs: Mapping[str, float | None]
    #: Of the resources that leases hold, those that exist.
    resources: frozenset[str]


@dataclass(frozen=True, slots=True)
class Leak:
    """A lease that should not be there any more."""

    lease: Lease
    #: Why, as the end of a sentence that begins with the lease.
    reason: str


def find_leaks(leases: Sequence[Lease], witnesses: Witnesses, *, now_wall_s: float, kept_s: float) -> list[Leak]:
    """Return the leases that leak, in their order.

    Args:
        leases: Live ones.
        witnesses: What is there.
        now_wall_s: Seconds, by the clock that leases are told by.
        kept_s: Seconds for which the longest kept of those that nobody renews are kept.
    """
    judged = (
        (lease, _reason(lease, witnesses, kept_s)) for lease in leases if lease.created_wall_s < now_wall_s - _NEW_S
    )
    return [Leak(lease, reason) for lease, reason in judged if reason]


def _reason(lease: Lease, witnesses: Witnesses, kept_s: float) -> str:
    labels = lease.labels
    if labels.get("kind") == "image":
        manifest = lease.id.removeprefix("image:")
        return (
            "" if manifest in witnesses.manifests else "holds the documents of an image that is not recorded any more"
        )
    if labels.get("owner") == "job":
        job = labels.get("job", "")
        if job not in witnesses.jobs:
            return f"is of job {job}, of which nothing is known"
        ended_wall_s = witnesses.jobs[job]
        if ended_wall_s is not None and (lease.expires_wall_s is None or lease.expires_wall_s > ended_wall_s + kept_s):
            return f"is of job {job}, which has ended, and goes on"
    if lease.expires_wall_s is None and labels.get("owner") != "user":
        return "has no expiry, and nobody has said that it is to have none"
    if lease.resources and not witnesses.resources.intersection(lease.resources):
        return "holds only what is gone"
    return ""
