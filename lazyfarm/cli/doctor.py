"""``lazyfarm doctor``: what is wrong with the machine and the farm, and what to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.human import count
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.gateway.access import gateway_url

if TYPE_CHECKING:
    from lazyfarm.doctor import Finding

app = command_app()


@app.command(epilog=example("lazyfarm doctor"))
def doctor(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Look for what is wrong, here and in the farm, and say what to do. Exit 1 if something fails.

    Changes nothing, and runs with or without a farm. Where LAZYFARM_URL names a gateway: the way there, and what the
    farm says of itself.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        findings = _examine(state_dir)
        out.document(
            {"findings": [{"check": f.check, "ok": f.ok, "detail": f.detail, "advice": f.advice} for f in findings]}
        )
        out.table(("CHECK", "", "DETAIL"), [(f.check, f.ok, f.detail) for f in findings])
        for finding in findings:
            if finding.advice and finding.ok != "ok":
                out.line(f"{finding.check}: {finding.advice}")
        failed = [finding.check for finding in findings if finding.ok == "fail"]
        if failed:
            if not as_json:
                out.stderr.write(f"error: {count(len(failed), 'check')} failed: {', '.join(failed)}\n")
            raise typer.Exit(EXIT_ERROR)


def _examine(state_dir: str | None) -> list[Finding]:
    if (url := gateway_url(state_dir, None, os.environ)) is not None:
        from lazyfarm.gateway.doctor import examine_gateway  # noqa: PLC0415 - what only drivers outside need

        return examine_gateway(url, os.environ)
    from lazyfarm.doctor import examine  # noqa: PLC0415 - boto3 and friends, not for --help

    return examine(state_dir, os.environ)
