"""The Python environment that OpenStack Swift runs in: its own, so that its pins never meet ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.errors import StartError
from storage.services.file_lock import locked_file

_LOCK_FILE = Path(__file__).with_name("swift.lock")
_COMPLETE = "lazyfarm-complete"
_INSTALL_S = 600.0


def default_location() -> Path:
    """Return where the environment is: $LAZYFARM_S3_ENV, else in the user's cache directory."""
    if named := os.environ.get("LAZYFARM_S3_ENV"):
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache, "lazyfarm", "swift-2.38.3").absolute()


def ensure_environment(location: Path | None = None) -> Path:
    """Make the environment unless it is there, and return its directory.

    Built beside *location* and renamed: whole or not there. Two at once wait for each other. Built anew
    after an upgrade that pins other versions, or when the interpreter it was made with is gone.

    Raises:
        StartError: it can't be made; the reason is what the installer said.
    """
    target = location or default_location()
    if _is_usable(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    too_late = StartError("S3 server's environment", f"another process has been making it for {_INSTALL_S:.0f} s", "")
    with locked_file(target.with_name(f".{target.name}.lock"), deadline_s=_INSTALL_S, too_late=too_late):
        if _is_usable(target):  # another process has made it meanwhile
            return target
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            _install(draft)
            (draft / _COMPLETE).write_text(_pins())
            if target.exists():
                # Moved, not emptied: what still runs from it keeps finding its files until they are removed.
                target.rename(draft / "replaced")
            draft.rename(target)
            shutil.rmtree(target / "replaced", ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def python_of(environment: Path) -> Path:
    """Return the environment's interpreter."""
    return environment / "bin" / "python"


def _is_usable(target: Path) -> bool:
    try:
        return (target / _COMPLETE).read_text() == _pins() and python_of(target).exists()
    except OSError:
        return False


def _pins() -> str:
    return hashlib.sha256(_LOCK_FILE.read_bytes()).hexdigest()


def _install(draft: Path) -> None:
    uv = shutil.which("uv")
    python = str(python_of(draft))
    if uv is not None:
        make = [uv, "venv", "--quiet", "--no-config", "--allow-existing", "--python", sys.executable, str(draft)]
        fill = [uv, "pip", "install", "--quiet", "--python", python]
    else:
        make = [sys.executable, "-m", "venv", str(draft)]
        fill = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    _run(make)
    _run([*fill, "--require-hashes", "--no-deps", "-r", str(_LOCK_FILE)])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(  # noqa: S603 - a fixed command
            command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_INSTALL_S
        )
    except subprocess.CalledProcessError as exc:
        lines = (exc.stderr or exc.stdout or "").strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit {exc.returncode}"
        raise StartError("S3 server's environment", f"{' '.join(command[:3])}: {reason}", "") from exc
    except subprocess.TimeoutExpired as exc:
        raise StartError("S3 server's environment", f"not installed after {_INSTALL_S:.0f} s", "") from exc
    except OSError as exc:
        raise StartError("S3 server's environment", f"{command[0]}: {exc.strerror}", "") from exc
