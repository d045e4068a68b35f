"""The boundary of every command: whatever happens inside becomes one line and an exit code."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from cluster.errors import ClusterError, NotInstalledError
from lazyfarm.cli.output import Output
from lazyfarm.settings import default_state_dir

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "LAZYFARM_DEBUG"


@contextmanager
def reporting(*, as_json: bool, state_dir: str | None) -> Iterator[Output]:
    """Give a command its output; turn every error into one line, exit 1, and Ctrl-C into exit 130.

    An error that is none of ours is a bug: its traceback goes to the state directory's log, and to stderr
    with ``LAZYFARM_DEBUG=1``.
    """
    out = Output(as_json=as_json)
    try:
        yield out
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise  # exits that were meant, and a reader such as `head` that has seen enough
    except KeyboardInterrupt:
        if as_json:
            out.error("Interrupted", "interrupted; this call's part was cancelled", "")
        else:
            out.stderr.write("interrupted; this call's part was cancelled\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except ClusterError as exc:
        _show_traceback(out)
        out.error(type(exc).__name__, str(exc), exc.hint)
        raise typer.Exit(EXIT_ERROR) from None
    except ModuleNotFoundError as exc:
        _show_traceback(out)
        missing = NotInstalledError(exc.name or "another package")
        out.error(type(missing).__name__, str(missing), missing.hint)
        raise typer.Exit(EXIT_ERROR) from None
    except Exception as exc:  # noqa: BLE001 - the last resort, which promises one line whatever it is
        _show_traceback(out)
        out.error(type(exc).__name__, f"{type(exc).__name__}: {exc}", _record(state_dir))
        raise typer.Exit(EXIT_ERROR) from None


def _show_traceback(out: Output) -> None:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        out.stderr.write(traceback.format_exc())


def _record(state_dir: str | None) -> str:
    """Append the traceback to the state directory's log; return where it is to be found."""
    log = Path(state_dir or default_state_dir(os.environ)).expanduser() / "logs" / "crashes.log"
    try:
        if not log.parent.is_dir():
            raise FileNotFoundError
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} pid {os.getpid()}\n")
            file.write(traceback.format_exc() + "\n")
    except OSError:
        return f"this is a bug in lazyfarm; {DEBUG_VARIABLE}=1 shows the traceback"
    return f"this is a bug in lazyfarm; please report it with the traceback in {log}"
