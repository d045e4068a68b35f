"""``lazyfarm page``: the address that opens the farm's page."""

from __future__ import annotations

from cluster.errors import PageNotRunningError
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example

app = command_app()


@app.command(epilog=example("lazyfarm page", "xdg-open $(lazyfarm page)"))
def page(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Print the address that opens the farm's page. The token in it lets whoever has it look at everything there.

    With LAZYFARM_URL it is the address under the gateway's.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        link = parts.page_link(settings)
        if not link:
            raise PageNotRunningError(str(settings.state_dir))
        out.document({"page": link})
        out.line(link)
