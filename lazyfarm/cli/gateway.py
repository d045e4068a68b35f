"""``lazyfarm gateway``: drivers from outside the cluster come in."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output

if TYPE_CHECKING:
    from lazyfarm.cli import documents
    from lazyfarm.settings import FarmSettings

app = command_app()


@app.command(epilog=example("lazyfarm gateway", "LAZYFARM__GATEWAY__PORT=9443 lazyfarm gateway"))
def gateway(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Let drivers in that are outside the cluster and have no Ray, until it is interrupted.

    They name its address by LAZYFARM_URL and a file with its token by LAZYFARM_TOKEN_FILE; under the same address a
    browser finds the page. Where it listens is set under [gateway]. With gateway.enabled `lazyfarm up` starts it.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.running_settings(state_dir)
        parts.serving(settings, "gateway", lambda: serve(settings, out))


async def serve(settings: FarmSettings, out: Output) -> None:
    """Tell where the gateway is, and let in who comes, for ever."""
    from lazyfarm.gateway.server import open_gateway, token_file  # noqa: PLC0415 - after the settings are known good

    async with open_gateway(settings) as (_, url):
        token = token_file(settings.state_dir)
        told: documents.GatewayAddress = {"gateway": url, "token_file": str(token)}
        out.document(told)
        out.line(f"gateway: {url}")
        out.line(f"token: {token}")
        out.stdout.flush()
        await asyncio.Event().wait()
