"""A container as a node of Kubernetes runs a privileged one: runc, all rights, this machine's network."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RUNC = "runc"


@dataclass
class Container:
    """A container that runs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as ``kubectl exec`` does."""
        return subprocess.run(
            [_RUNC, "exec", self.name, *command], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def json(self, *command: str, timeout_s: float = 120) -> dict[str, Any]:
        """Run a command that succeeds in it; return its document."""
        done = self.run(*command, "--json", timeout_s=timeout_s)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}\n{self.log.read_text()[-5000:]}"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def stop(self, timeout_s: float = 60) -> int:
        """Send SIGTERM to its first process; return what that ended with."""
        subprocess.run([_RUNC, "kill", self.name, "TERM"], check=True)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def container(
    root: Path, config: Mapping[str, Any], *args: str, env: Mapping[str, str], volumes: Mapping[Path, str]
) -> Iterator[Container]:
    """Run a container upon a file system that stays as it is, and kill it at the end.

    Args:
        root: The file system.
        config: Of its image: entry point, environment, working directory.
        args: Instead of the image's command.
        env: Beside the image's own.
        volumes: Directories of this machine by where they are mounted.
    """
    name = f"lf-node-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        bundle = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lf-node-", ignore_cleanup_errors=True)))
        for directory in ("upper", "work", "rootfs"):
            (bundle / directory).mkdir()
        layers = f"lowerdir={root},upperdir={bundle}/upper,workdir={bundle}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, name, bundle / "rootfs"], check=True)
        stack.callback(subprocess.run, ["umount", "-l", bundle / "rootfs"], check=True)
        spec = _spec([*config["Entrypoint"], *args], [*config["Env"], *(f"{k}={v}" for k, v in env.items())], volumes)
        spec["process"]["cwd"] = config["WorkingDir"]
        (bundle / "config.json").write_text(json.dumps(spec))
        log = bundle / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [_RUNC, "run", "-b", str(bundle), name], stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        # Last begun, first ended: nothing of it runs any more when its file system goes.
        stack.callback(subprocess.run, [_RUNC, "delete", "--force", name], check=False, capture_output=True)
        stack.callback(process.wait, 60)
        stack.callback(subprocess.run, [_RUNC, "kill", "--all", name, "KILL"], check=False, capture_output=True)
        give_up_s = time.monotonic() + 60
        while not _runs(name):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up_s, log.read_text()
            time.sleep(0.1)
        yield Container(name, process, log)


def _runs(name: str) -> bool:
    state = subprocess.run([_RUNC, "state", name], capture_output=True, text=True, check=False)
    return state.returncode == 0 and json.loads(state.stdout)["status"] == "running"


def _spec(args: Sequence[str], env: Sequence[str], volumes: Mapping[Path, str]) -> dict[str, Any]:
    told = Path("/proc/self/status").read_text()
    bits = int(told.partition("CapBnd:")[2].split()[0], 16)
    names = subprocess.run(["capsh", f"--decode={bits:x}"], capture_output=True, text=True, check=True).stdout
    capabilities = [name.upper() for name in names.strip().partition("=")[2].split(",")]
    system = [
        ("/proc", "proc", "proc", []),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", "size=256m"]),  # noqa: S108
        ("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev"]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime"]),
        ("/tmp", "tmpfs", "tmpfs", ["mode=1777"]),  # noqa: S108
    ]
    binds = [(target, "bind", str(source), ["rbind", "rw"]) for source, target in volumes.items()]
    binds += [(path, "bind", path, ["rbind", "ro"]) for path in ("/etc/hosts", "/etc/resolv.conf")]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": list(env),
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "root": {"path": "rootfs"},
        "hostname": "node",
        "mounts": [
            {"destination": target, "type": kind, "source": source, "options": options}
            for target, kind, source, options in (*system, *binds)
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
        },
    }
