"""The network between processes of this machine, cut off silently or answered by resets: rules of its packet filter.

A silent cut drops packets and closes nothing: whoever waits for an answer learns nothing, as where a cable was
pulled. Only loopback is touched, and only ports and processes that a test names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Seconds that a process may take to end.
_ENDING_S = 10.0
_DROP = ("-j", "DROP")
#: What the kernel answers for a port on which nobody listens any more.
_REFUSE = ("-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")


@contextlib.contextmanager
def cut_off(*pids: int) -> Iterator[None]:
    """Drop all that processes send and are sent over TCP while the body runs; they live, and keep every connection.

    The connections that they have are known by their ports. Those that they try to make meanwhile are known by a
    cgroup, in which the processes are for that time: a socket is of the group in which it was made.
    """
    name = f"lf-cut-{os.getpid()}-{secrets.token_hex(4)}"
    group = _cgroups() / name
    group.mkdir()
    former = {pid: path for pid in pids if (path := _cgroup_of(pid)) is not None}
    try:
        for pid in former:
            _move(pid, group)
        rules = [("-m", "cgroup", "--path", name, *_DROP)]
        for port in sorted({port for pid in former for port in local_ports(pid)}):
            rules += _of_port(port, _DROP)
        with _rules(name, rules):
            yield
    finally:
        for pid, path in former.items():
            _move(pid, path)
        # What a process that was killed meanwhile has started is in it still.
        for pid in (group / "cgroup.procs").read_text().split():
            _move(int(pid), _cgroups())
        _remove(group)


@contextlib.contextmanager
def silenced(*ports: int) -> Iterator[None]:
    """Drop all that is sent to and from ports of loopback while the body runs."""
    with _rules(f"lf-mute-{secrets.token_hex(4)}", [rule for port in ports for rule in _of_port(port, _DROP)]):
        yield


@contextlib.contextmanager
def refused(*ports: int) -> Iterator[None]:
    """Reset every connection to ports of loopback while the body runs, as if their process was killed."""
    rules = [("-p", "tcp", "--dport", str(port), *_REFUSE[2:]) for port in ports]
    with _rules(f"lf-dead-{secrets.token_hex(4)}", rules):
        yield


def local_ports(pid: int) -> set[int]:
    """Return the local ports of a process's TCP sockets; none where it has ended."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        links = [link for link in _links(Path(f"/proc/{pid}/fd")) if link.startswith("socket:[")]
        inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in inodes:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def _links(directory: Path) -> Iterator[str]:
    for link in directory.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            yield str(link.readlink())


def _of_port(port: int, then: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [("-p", "tcp", side, str(port), *then) for side in ("--sport", "--dport")]


@contextlib.contextmanager
def _rules(chain: str, rules: Iterable[tuple[str, ...]]) -> Iterator[None]:
    """Have rules for what is sent on loopback, in a chain of their own."""
    lines = ["*filter", f":{chain} - [0:0]", *(f"-A {chain} {' '.join(rule)}" for rule in rules)]
    _restore([*lines, f"-I OUTPUT -o lo -j {chain}", "COMMIT"])
    try:
        yield
    finally:
        _restore(["*filter", f"-D OUTPUT -o lo -j {chain}", f"-F {chain}", f"-X {chain}", "COMMIT"])


def _restore(lines: Iterable[str]) -> None:
    subprocess.run(["iptables-restore", "-w", "-n"], input="\n".join(lines) + "\n", text=True, check=True)


def _cgroups() -> Path:
    """Return where the second version of cgroups is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, point, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(point)
    raise AssertionError("cgroup2 is mounted nowhere")


def _cgroup_of(pid: int) -> Path | None:
    """Return the cgroup of a process; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in lines:
        if line.startswith("0::/"):
            return _cgroups() / line.removeprefix("0::/")
    raise AssertionError(f"process {pid} is in no cgroup")


def _remove(group: Path) -> None:
    """Remove a cgroup; one whose last process is ending at this moment is busy until all of its threads have."""
    give_up_s = time.monotonic() + _ENDING_S
    while True:
        try:
            group.rmdir()
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > give_up_s:
                raise
            time.sleep(0.01)
        else:
            return


def _move(pid: int, group: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))
