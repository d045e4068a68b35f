"""``lazyfarm submit``: a driver script as a job of the farm's Ray."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InvalidArgumentError
from lazyfarm.cli import parts
from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.driving import run_to_end
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.settings import FarmSettings, load_settings

app = command_app()


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog=example(
        "lazyfarm submit driver.py debian:12",
        "lazyfarm submit --env DOCKER_CONFIG=/etc/ci/docker nightly.py",
        "lazyfarm submit --address http://farm:8265 --token-file ~/farm-token driver.py",
    ),
)
def submit(
    *,
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="Its path, from the working directory on.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARG]...", help="What it is called with.", show_default=False)
    ] = None,
    working_dir: Annotated[
        str, typer.Option("--working-dir", metavar="DIR", help="Is sent along, and is where the script runs.")
    ] = ".",
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=VALUE", help="A variable of the script. No secret: Ray shows it."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="The job's. Default: Ray chooses.", show_default=False)
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            "--address", metavar="URL", help="The farm's job server, from another machine.", show_default=False
        ),
    ] = "",
    token_file: Annotated[
        str,
        typer.Option(
            "--token-file",
            metavar="FILE",
            envvar="RAY_AUTH_TOKEN_PATH",
            help="The token that it asks for; goes with --address.",
            show_default=False,
        ),
    ] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end, or only begin it.")] = True,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a driver script on the farm's head, and show what it prints; Ctrl-C stops it.

    Exits as the script does. `ray job ls`, `logs` and `stop` know it, too: `lazyfarm status` says where.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        pairs = [text.partition("=") for text in env or ()]
        if wrong := next(
            (text for text, (key, is_pair, _) in zip(env or (), pairs, strict=True) if not (key and is_pair)), ""
        ):
            raise InvalidArgumentError("--env", wrong, "it is no NAME=VALUE")
        from lazyfarm.submission import submit as submit_script  # noqa: PLC0415 - not before it is needed

        settings = _elsewhere(state_dir, token_file) if address else parts.running_settings(state_dir)

        def say(text: str) -> None:
            stream = out.stderr if as_json else out.stdout
            stream.write(text)
            stream.flush()

        done = run_to_end(
            lambda: submit_script(
                settings,
                script,
                arguments or (),
                working_dir=Path(working_dir).expanduser().absolute(),
                environment={key: value for key, _, value in pairs},
                submission_id=name,
                address=address,
                on_log=say if wait else None,
            )
        )
        out.document({"job": done.id, "status": done.status.lower(), "exit_code": done.exit_code})
        if not wait:
            out.line(f"submitted {done.id}")
        elif done.status != "SUCCEEDED":
            if not as_json:
                out.stderr.write(f"error: job {done.id} {done.status.lower()}: {done.message}\n")
            raise typer.Exit(done.exit_code if done.exit_code is not None and done.exit_code > 0 else EXIT_ERROR)


def _elsewhere(state_dir: str | None, token_file: str) -> FarmSettings:
    """Return settings for a farm that another machine runs: what is recorded of one here is none of its business.

    Raises:
        InvalidArgumentError: there is no such file.
    """
    file = Path(token_file).expanduser()
    if token_file and not file.is_file():
        raise InvalidArgumentError("--token-file", token_file, "there is no such file")
    settings = load_settings(state_dir, None, os.environ)
    ray = replace(settings.wanted.ray, token_file=str(file) if token_file else "")
    return replace(settings, wanted=replace(settings.wanted, ray=ray), running=None)
