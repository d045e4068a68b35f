"""The project as a wheel, and environments that have it, as people make them."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).parents[2]
#: The last commit that knew neither traces nor extras: what is upgraded from, as a release before this one.
PREVIOUS = "eecfc923396e2892f60c63e7a941832a43e54331"
PREVIOUS_VERSION = "0.0.9"
_FOLDERS = ("actors", "cluster", "configs", "lazyfarm", "storage")
_FILES = ("LICENSE", "README.md", "pyproject.toml")


def uv(*arguments: str | Path, environ: Mapping[str, str] | None = None) -> None:
    """Run uv, the one that the project's environment was made with; with some variables more."""
    program = shutil.which("uv") or str(_ROOT / ".uv" / "bin" / "uv")
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def build_wheel(directory: Path, version: str = "") -> Path:
    """Build a wheel of the project under *directory*, of another *version* where one is given."""
    source = Path(tempfile.mkdtemp(dir=directory))
    for name in _FOLDERS:
        shutil.copytree(_ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(_ROOT / name, source / name)
    return _built(source, version)


def build_previous_wheel(directory: Path) -> Path:
    """Build a wheel of the release before under *directory*, from the code of that time: it is in the history.

    In a clone without history it is this code under that number, of which a test sees less.
    """
    if subprocess.run(["git", "-C", _ROOT, "cat-file", "-e", PREVIOUS], capture_output=True, check=False).returncode:
        return build_wheel(directory, PREVIOUS_VERSION)
    source = Path(tempfile.mkdtemp(dir=directory))
    archive = ["git", "-C", _ROOT, "archive", PREVIOUS, *_FOLDERS, *_FILES]
    told = subprocess.run(archive, capture_output=True, timeout=60, check=True)
    with tarfile.open(fileobj=io.BytesIO(told.stdout)) as tar:
        tar.extractall(source, filter="data")
    return _built(source, PREVIOUS_VERSION)


def _built(source: Path, version: str = "") -> Path:
    if version:
        project = source / "pyproject.toml"
        project.write_text(re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', project.read_text()))
    uv("build", "-q", "--wheel", "-o", source / "dist", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def install(venv: Path, wheel: Path, *options: str, extras: str = "farm") -> None:
    """Install a wheel in an environment, with what it needs in the versions that the project is tested with."""
    wanted = f"lazyfarm[{extras}]" if extras else "lazyfarm"
    with _pinned() as pins:
        uv("pip", "install", *pins, *options, f"{wanted} @ {wheel.as_uri()}", "--python", venv / "bin" / "python")


def install_tool(directory: Path, wheel: Path) -> Path:
    """Install a wheel as ``uv tool`` does, under a directory; return its command."""
    with _pinned() as pins:
        uv("tool", "install", *pins, "--python", python(), wheel, environ=_tools(directory))
    return directory / "bin" / "lazyfarm"


def uninstall_tool(directory: Path) -> None:
    """Take away what :func:`install_tool` installed."""
    uv("tool", "uninstall", "-q", "lazyfarm", environ=_tools(directory))


def python() -> str:
    """Return the interpreter that environments are made from."""
    return shutil.which("python3") or "python3"


def _tools(directory: Path) -> dict[str, str]:
    return {"UV_TOOL_DIR": str(directory / "tools"), "UV_TOOL_BIN_DIR": str(directory / "bin")}


@contextmanager
def _pinned() -> Iterator[Sequence[str]]:
    """Lend uv's options for the versions that the project is tested with."""
    pins = re.findall(r"^[\w.-]+(?:\[.*\])?==[^ ]+", (_ROOT / "requirements.lock").read_text(), re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", prefix="lf-constraints-") as constraints:
        constraints.write("\n".join(pins))
        constraints.flush()
        yield "-q", "--index-strategy", "unsafe-best-match", "--constraints", constraints.name
