"""The gateway's process: ``python -m lazyfarm.gateway STATE_DIR DIGEST HOST PORT``, as ``lazyfarm up`` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.gateway import serve
from lazyfarm.settings import load_running


def main(state_dir: str) -> int:
    """Serve the farm that runs under *state_dir* as `up` recorded it; return the exit code."""
    try:
        with reporting(as_json=False, state_dir=state_dir) as out:
            settings = load_running(Path(state_dir), {})
            parts.serving(settings, "gateway", lambda: serve(settings, out))
    except typer.Exit as exc:
        return exc.exit_code
    return 0


if __name__ == "__main__":
    # What comes after it is there to be compared: see storage/services/http_service.py.
    sys.exit(main(sys.argv[1]))
