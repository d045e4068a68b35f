"""The page's process: ``python -m lazyfarm.web STATE_DIR DIGEST HOST PORT``, as ``lazyfarm up`` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from lazyfarm.settings import load_running
from lazyfarm.web.app import build_app
from lazyfarm.web.reading import FarmReader
from storage.services.page import PageService
from storage.services.state_dir import StateDir

#: Seconds that who looks on has to leave when it ends.
_LEAVE_S = 1
_FARM_DIGITS = 8


def main(state_dir: str, host: str, port: str) -> None:
    """Serve the page of the farm that runs under *state_dir*."""
    settings = load_running(Path(state_dir), {})
    state = StateDir(settings.state_dir)
    app = build_app(
        FarmReader(settings),
        token=PageService(state).token_file.read_text().strip(),
        cookie=f"lazyfarm-{state.farm_id()[:_FARM_DIGITS]}",
    )
    uvicorn.run(
        app,
        host=host,
        port=int(port),
        access_log=False,  # an address may have the token in it
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LEAVE_S,
    )


if __name__ == "__main__":
    # What comes second is there to be compared: see storage/services/page.py.
    main(sys.argv[1], sys.argv[3], sys.argv[4])
