"""The project as a wheel, and environments that have it, as people make them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def uv(*arguments: str | Path) -> None:
    """Run uv, the one that the project's environment was made with."""
    program = shutil.which("uv") or str(_ROOT / ".uv" / "bin" / "uv")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def build_wheel(directory: Path, version: str = "") -> Path:
    """Build a wheel of the project under *directory*, of another *version* where one is given."""
    source = Path(tempfile.mkdtemp(dir=directory))
    for name in ("actors", "cluster", "configs", "lazyfarm", "storage"):
        shutil.copytree(_ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(_ROOT / name, source / name)
    if version:
        project = source / "pyproject.toml"
        project.write_text(re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', project.read_text()))
    uv("build", "-q", "--wheel", "-o", source / "dist", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def install(venv: Path, wheel: Path, *options: str) -> None:
    """Install a wheel in an environment, with what it needs in the versions that the project is tested with."""
    pins = re.findall(r"^[\w.-]+(?:\[.*\])?==[^ ]+", (_ROOT / "requirements.lock").read_text(), re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", prefix="lf-constraints-") as constraints:
        constraints.write("\n".join(pins))
        constraints.flush()
        command = ["pip", "install", "-q", "--index-strategy", "unsafe-best-match", "-c", constraints.name]
        uv(*command, *options, f"lazyfarm[farm] @ {wheel.as_uri()}", "--python", venv / "bin" / "python")
