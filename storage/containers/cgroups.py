"""The cgroups that containers run in: below this process's own, so that its limits hold for them, too."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from cluster.errors import LimitUnavailableError
from cluster.graph import Limits

_MOUNTS: Final = Path("/sys/fs/cgroup")
_GROUP: Final = "lazyfarm"
#: Processes that were killed leave their cgroup when they are reaped.
_EMPTY_WITHIN_S: Final = 5.0


class Cgroups:
    """What this process may do with cgroups, as the runtime's cgroupfs driver does it; v1 and v2."""

    def __init__(self) -> None:
        #: Directories that containers' cgroups are made in, by controller; v2's one by "".
        self._groups = _unified() if (_MOUNTS / "cgroup.controllers").exists() else _separate()
        #: What can be limited.
        self.controllers = _delegated(self._groups[""]) if "" in self._groups else frozenset(self._groups)

    @property
    def are_writable(self) -> bool:
        """Tell whether containers can have cgroups at all."""
        return "" in self._groups or "devices" in self._groups

    def check(self, limits: Limits) -> None:
        """Check that *limits* can be kept.

        Raises:
            LimitUnavailableError: one can't.
        """
        for controller, wanted in (("memory", limits.memory_bytes), ("cpu", limits.cpus), ("pids", limits.pids)):
            if wanted and controller not in self.controllers:
                raise LimitUnavailableError(f"limiting {controller}", f"no writable {controller} cgroup on this node")

    def path_for(self, container: str) -> str | None:
        """Return a container's cgroup as the runtime takes it: relative to ours; None where there can't be any."""
        return f"{_GROUP}/{container}" if self.are_writable else None

    def oom_kills(self, container: str) -> int:
        """Return how many processes of a container the kernel has killed for want of memory."""
        group = self._groups.get("", self._groups.get("memory"))
        if group is None:
            return 0
        file = group / container / ("memory.events" if "" in self._groups else "memory.oom_control")
        try:
            lines = file.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def clear(self, container: str) -> bool:
        """Kill what is left in a container's cgroups and remove them; tell whether there were any. Blocks."""
        there = [path for group in self._groups.values() if (path := group / container).is_dir()]
        deadline_s = time.monotonic() + _EMPTY_WITHIN_S
        for path in there:
            while True:
                with suppress(FileNotFoundError, OSError):
                    for line in (path / "cgroup.procs").read_text().split():
                        with suppress(ProcessLookupError):
                            os.kill(int(line), signal.SIGKILL)
                try:
                    path.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > deadline_s:
                        break
                    time.sleep(0.01)
                else:
                    break
        return bool(there)


def _own() -> dict[str, str]:
    """Return this process's cgroup by controller; v2's by ""."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    return own


def _unified() -> dict[str, Path]:
    # The runtime goes beside our own cgroup, too: one with processes in it can't have limited ones below.
    return _made({"": _existing(_MOUNTS, str(Path(_own().get("", "/")).parent))})


def _separate() -> dict[str, Path]:
    return _made({name: _existing(_MOUNTS / name, path) for name, path in _own().items() if name and "=" not in name})


def _existing(mount: Path, path: str) -> Path:
    # Within a container, paths may be those of the machine, and what is mounted our own part of it.
    inner = mount / path.lstrip("/")
    return inner if inner.is_dir() else mount


def _made(above: dict[str, Path]) -> dict[str, Path]:
    """Make our group in each directory; return those that cgroups can be made in."""
    groups: dict[str, Path] = {}
    for name, directory in above.items():
        group = directory / _GROUP
        try:
            group.mkdir(exist_ok=True)
            Path(tempfile.mkdtemp(dir=group, prefix="probe-")).rmdir()
        except OSError:
            continue
        groups[name] = group
    return groups


def _delegated(group: Path) -> frozenset[str]:
    """Return what v2 lets be limited below *group*, asking for it on the way."""
    for directory in (group.parent, group):
        for controller in ("memory", "cpu", "pids"):
            with suppress(OSError):
                (directory / "cgroup.subtree_control").write_text(f"+{controller}")
    try:
        return frozenset((group / "cgroup.subtree_control").read_text().split())
    except OSError:
        return frozenset()
