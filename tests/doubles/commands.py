"""A root file system to run commands in: this machine's shell and a few programs, with the libraries they need."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

COMMANDS = (
    "sh",
    "cat",
    "chmod",
    "head",
    "id",
    "ln",
    "ls",
    "mkdir",
    "mknod",
    "mv",
    "rm",
    "sleep",
    "stat",
    "tail",
    "touch",
)


def make_root(root: Path, commands: tuple[str, ...] = COMMANDS) -> Path:
    """Make *root* with ``/bin`` and the libraries, ``/etc/passwd`` and ``/tmp``, and nothing else."""
    for command in commands:
        found = shutil.which(command)
        assert found is not None, command
        _copy(Path(found), root / "bin" / command)
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+) \(", listed):
            _copy(Path(library), root / library.lstrip("/"))
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nbob:x:1000:1001::/home/bob:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nbob:x:1001:\nvideo:x:44:bob\n")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    return root


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.resolve(), target)
