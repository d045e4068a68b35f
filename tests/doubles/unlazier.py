"""An unlazier over real stores, for what is tested around it."""

from __future__ import annotations

import secrets
import time

from cluster.fetch.runner import Unlazier
from tests.doubles.fetch import OpenDoors


def unlazier_over(stores, renewer, transfers, **settings) -> Unlazier:
    """Return one that asks nobody for proofs, unless *settings* say otherwise."""
    defaults = {
        "worker": "w",
        "access": OpenDoors(),
        "new_token": lambda: secrets.token_hex(8),
        "ttl_s": 30.0,
        "poll_s": 1.0,
        "clock": time.monotonic,
    }
    return Unlazier(
        refs=stores.refs,
        flights=stores.flights,
        renewer=renewer,
        progress=stores.progress,
        transfers=transfers,
        **{**defaults, **settings},
    )
