"""What is told to the OCI runtime: a command, its mounts, its rights and its limits (runtime-spec 1.0).

Mounts, masked paths, capabilities and denied system calls are containerd's defaults as BuildKit uses them: no
``/run`` of its own, privileges may be gained (``sudo`` works), no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.graph import Limits, Network
from storage.containers.seccomp import profile
from storage.containers.users import ProcessUser

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_HOSTNAME: Final = "lazyfarm"
_CPU_PERIOD_US: Final = 100_000

_CAPABILITIES: Final = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)
_MASKED: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
_READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Something mounted in the container."""

    #: Absolute path in the container.
    target: str
    type: str
    source: str
    options: tuple[str, ...]


#: Directories that must be there to be mounted on; the other system mounts are within these.
SYSTEM_TARGETS: Final = ("/proc", "/dev", "/sys")
_SYSTEM_MOUNTS: Final = (
    Mount(target="/proc", type="proc", source="proc", options=("nosuid", "noexec", "nodev")),
    Mount(target="/dev", type="tmpfs", source="tmpfs", options=("nosuid", "strictatime", "mode=755", "size=65536k")),
    Mount(
        target="/dev/pts",
        type="devpts",
        source="devpts",
        options=("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    ),
    Mount(
        target="/dev/shm",  # noqa: S108  # the container's
        type="tmpfs",
        source="shm",
        options=("nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
    ),
    Mount(target="/dev/mqueue", type="mqueue", source="mqueue", options=("nosuid", "noexec", "nodev")),
    Mount(target="/sys", type="sysfs", source="sysfs", options=("nosuid", "noexec", "nodev", "ro")),
)
_CGROUP_MOUNT: Final = Mount(
    target="/sys/fs/cgroup", type="cgroup", source="cgroup", options=("nosuid", "noexec", "nodev", "relatime", "ro")
)


def bind(source: str, target: str, *, is_read_only: bool, extra: tuple[str, ...] = ()) -> Mount:
    """Return a mount of a file or directory of the node."""
    return Mount(target=target, type="bind", source=source, options=("bind", "ro" if is_read_only else "rw", *extra))


def tmpfs(target: str, *, size_bytes: int) -> Mount:
    """Return a mount of an empty file system in memory; *size_bytes* 0: as large as the kernel lets it."""
    size = (f"size={size_bytes}",) if size_bytes else ()
    return Mount(target=target, type="tmpfs", source="tmpfs", options=("nosuid", "nodev", *size))


def runtime_spec(
    *,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    user: ProcessUser,
    root: Path,
    mounts: Sequence[Mount],
    hostname: str = "",
    network: Network = Network.NONE,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    cgroup: str | None,
) -> dict[str, Any]:
    """Return the runtime's ``config.json``.

    Args:
        args: The command; its first word is looked up in the environment's PATH.
        env: Its whole environment; PATH is added where it is missing.
        cwd: Absolute path of its working directory.
        user: Who it runs as.
        root: Directory of its root file system, writable.
        mounts: Beside the system's own; mounted in the order of their targets' depth.
        hostname: "" for the default.
        network: None is a network of its own with a loopback device only.
        limits: What it may use.
        cgroup: Path of its cgroup, as the runtime takes it; None where the node has no writable cgroups. Nothing
            keeps it from device nodes that it makes then, so it may not make any.
    """
    capabilities = [name for name in _CAPABILITIES if cgroup is not None or name != "CAP_MKNOD"]
    namespaces = [{"type": name} for name in ("pid", "ipc", "uts", "mount", "cgroup")]
    if network is Network.NONE:
        namespaces.append({"type": "network"})
    system = [*_SYSTEM_MOUNTS, *([_CGROUP_MOUNT] if cgroup is not None else [])]
    ordered = sorted(mounts, key=lambda mount: len([part for part in mount.target.split("/") if part]))
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READ_ONLY),
    }
    filtered = profile()
    if filtered is not None:
        linux["seccomp"] = filtered
    if cgroup is not None:
        linux["cgroupsPath"] = cgroup
        linux["resources"] = _resources(limits)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups), "umask": 0o022},
            "args": list(args),
            "env": [f"{name}={value}" for name, value in {"PATH": DEFAULT_PATH, **env}.items()],
            "cwd": cwd,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": False,
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": hostname or DEFAULT_HOSTNAME,
        "mounts": [
            {"destination": each.target, "type": each.type, "source": each.source, "options": list(each.options)}
            for each in (*system, *ordered)
        ],
        "linux": linux,
    }


def _resources(limits: Limits) -> dict[str, Any]:
    # No device but those that the runtime itself allows: null, zero, full, random, urandom, tty, ptmx, pts.
    resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if limits.memory_bytes:
        # Swap counts as well: a limit that spills to the disk is none.
        resources["memory"] = {"limit": limits.memory_bytes, "swap": limits.memory_bytes}
    if limits.cpus:
        resources["cpu"] = {"quota": max(int(limits.cpus * _CPU_PERIOD_US), 1000), "period": _CPU_PERIOD_US}
    if limits.pids:
        resources["pids"] = {"limit": limits.pids}
    return resources
