"""``lazyfarm leases``: what is kept from being collected, and until when."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.lease import Lease

app = command_app()


@app.callback(epilog=example("lazyfarm leases ls"))
def leases() -> None:
    """List leases. Reads records only: Ray is not joined."""


@app.command("ls", epilog=example("lazyfarm leases ls --json"))
def list_leases(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """List the live leases, with what each holds."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        with parts.reading(parts.running_settings(state_dir)) as records:
            found = records.leases()
        out.document({"leases": [document(lease) for lease in found]})
        out.table(
            ("LEASE", "EXPIRES", "HOLDS", "LABELS"),
            [
                (
                    lease.id,
                    _expiry(lease.expires_wall_s),
                    count(len(lease.resources), "resource"),
                    " ".join(f"{name}={value}" for name, value in sorted(lease.labels.items())),
                )
                for lease in found
            ],
        )
        out.line(count(len(found), "lease"))


def document(lease: Lease) -> dict[str, object]:
    """Return a lease as ``leases ls`` has it; times are wall-clock seconds, null: pinned."""
    return {
        "id": lease.id,
        "created": lease.created_wall_s,
        "expires": lease.expires_wall_s,
        "labels": lease.labels,
        "resources": list(lease.resources),
    }


def _expiry(expires_wall_s: float | None) -> str:
    if expires_wall_s is None:
        return "pinned"
    left_s = expires_wall_s - time.time()
    return f"in {duration(left_s)}" if left_s > 0 else "expired"
