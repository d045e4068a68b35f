"""One process of a farm: started once, found again by any later command, and ended exactly.

A process is known by its pid *and* its start time and boot, because pids are reused. Everything a
farm starts carries its mark in the environment, which children inherit, so that what a ``kill -9``
orphaned is found and ended too, and nothing else ever is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from cluster.errors import StartError
from storage.services.state_dir import StateDir, write_atomic

#: In the environment of every process of a farm: the farm's UUID.
FARM_MARK = "LAZYFARM_FARM_ID"
#: Beside it: which service of the farm.
SERVICE_MARK = "LAZYFARM_SERVICE"

_ENV = "/usr/bin/env"
#: Begins the variables that override the configuration, for the command that has them: what `up` was told is on
#: record, and what it is told next time holds for what runs since this time, too.
_OVERRIDE = "LAZYFARM__"
_STOP_S = 10.0
_KILL_S = 5.0
_POLL_S = 0.03
_LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """What ``run/NAME.json`` says of a process."""

    #: 0 after it was stopped on purpose.
    pid: int
    #: Field 22 of /proc/PID/stat: clock ticks from boot to its start.
    start_ticks: int
    #: The kernel's boot ID: ticks count from there.
    boot_id: str
    command: tuple[str, ...]
    #: Ports it was given, by use; a restart asks for the same.
    ports: dict[str, int] = field(default_factory=dict)


class ServiceProcess:
    """The process *name* of the farm in *state*. Callers hold ``state.lock(name)`` to start or stop it."""

    def __init__(self, state: StateDir, name: str) -> None:
        self.name = name
        self._state = state
        self._record_path = state.run / f"{name}.json"

    def __repr__(self) -> str:
        return f"ServiceProcess({self.name!r}, pid={self.pid}, alive={self.is_alive()})"

    @property
    def log(self) -> Path:
        """Return the file it prints to."""
        return self._state.logs / f"{self.name}.log"

    def record(self) -> ProcessRecord | None:
        """Return what is recorded of it; None where it was never started."""
        try:
            fields = json.loads(self._record_path.read_text())
            return ProcessRecord(**{**fields, "command": tuple(fields["command"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            return None  # of another release, or damaged: its processes are found by their mark

    @property
    def pid(self) -> int | None:
        """Return the recorded pid, alive or not; None where it was never started or was stopped."""
        record = self.record()
        return None if record is None else record.pid or None

    @property
    def ports(self) -> dict[str, int]:
        """Return the recorded ports; empty where there are none."""
        record = self.record()
        return {} if record is None else record.ports

    def is_alive(self) -> bool:
        """Tell whether the very process that was recorded still runs."""
        record = self.record()
        return record is not None and _is_running(record)

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        ports: Mapping[str, int] | None = None,
    ) -> None:
        """Start *command* in a session of its own, after ending what an earlier run left of it.

        Args:
            command: Absolute path of the program and its arguments. No secrets: anyone can read them.
            environment: Added to this process's environment, less what overrides the configuration. No secrets
                either: paths of their files.
            ports: What to record, so that a restart can ask for the same.

        Raises:
            StartError: the process could not be made.
        """
        self._state.create()
        self._end_marked()
        marked = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_OVERRIDE)},
            **(environment or {}),
            FARM_MARK: self._state.farm_id(),
            SERVICE_MARK: self.name,
        }
        log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            # Not subprocess: the child outlives this process, and nobody waits for it.
            pid = os.posix_spawn(
                _ENV,
                # The state directory as working directory: not one that its user may want to remove, and none
                # whose files shadow a module's name.
                [_ENV, f"--chdir={self._state.root}", *command],
                marked,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(self.log), log_flags, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
                # Python ignores SIGPIPE and a shell may have ignored SIGINT for us: servers start clean.
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGHUP, signal.SIGTERM],
                setsigmask=[],
            )
        except OSError as exc:
            raise StartError(self.name, f"{_ENV}: {exc.strerror}", "") from exc
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            raise self._ended()
        record = ProcessRecord(
            pid=pid, start_ticks=start_ticks, boot_id=_boot_id(), command=tuple(command), ports=dict(ports or {})
        )
        self._write(record)

    def wait_until(self, is_ready: Callable[[], bool], *, deadline_s: float) -> None:
        """Wait until *is_ready* says so.

        Raises:
            StartError: the process ended, or was not ready in *deadline_s* seconds.
        """
        give_up_at = time.monotonic() + deadline_s
        while not is_ready():
            if not self.is_alive():
                raise self._ended()
            if time.monotonic() >= give_up_at:
                raise StartError(self.name, f"it was not ready after {deadline_s:.0f} s", str(self.log))
            time.sleep(_POLL_S)

    def _ended(self) -> StartError:
        return StartError(self.name, f"it ended: {self.last_words() or 'without a word'}", str(self.log))

    def last_words(self) -> str:
        """Return the last line that it printed; empty where there is none."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip() if lines else ""

    def stop(self, *, deadline_s: float = _STOP_S) -> bool:
        """End the process and everything that carries its mark; tell whether it ran.

        SIGTERM to the process, SIGKILL after *deadline_s* seconds, then SIGKILL to what it leaves behind.
        The record is changed last: a stop that is itself killed is simply made again. Its ports stay in it.
        """
        record = self.record()
        was_running = (
            record is not None
            and record.boot_id == _boot_id()
            and _end(record.pid, record.start_ticks, deadline_s=deadline_s)
        )
        left = self._end_marked()
        if record is not None:
            self._write(replace(record, pid=0))
        return was_running or bool(left)

    def _write(self, record: ProcessRecord) -> None:
        write_atomic(self._record_path, json.dumps(asdict(record), indent=1))

    def _end_marked(self) -> list[int]:
        farm_id = self._state.known_farm_id()
        return [] if farm_id is None else end_marked({FARM_MARK: farm_id, SERVICE_MARK: self.name})


def end_marked(marks: Mapping[str, str]) -> list[int]:
    """SIGKILL every process whose environment carries all of *marks*; return their pids.

    Spares this process and its ancestors, so that a farm can be stopped from one of its own jobs. Looks
    again until none is found, because a process may have forked meanwhile.
    """
    spared = _ancestry(os.getpid())
    ended: list[int] = []
    give_up_at = time.monotonic() + _KILL_S
    while found := [(pid, ticks) for pid, ticks in _marked(marks) if pid not in spared]:
        for pid, ticks in found:
            if _end(pid, ticks, deadline_s=0.0):
                ended.append(pid)
        if time.monotonic() >= give_up_at:
            break
    return ended


def marked_pids(marks: Mapping[str, str]) -> list[int]:
    """Return the pids of the running processes whose environment carries all of *marks*."""
    return [pid for pid, _ in _marked(marks)]


def _marked(marks: Mapping[str, str]) -> Iterable[tuple[int, int]]:
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names are all that is needed
        if not entry.isdigit():
            continue
        try:
            environment = Path("/proc", entry, "environ").read_bytes()
        except OSError:
            continue  # it ended, or is not ours to look at: then not ours to end either
        if wanted.issubset(environment.split(b"\0")):
            ticks = _start_ticks(int(entry))
            if ticks is not None:
                yield int(entry), ticks


def _end(pid: int, start_ticks: int, *, deadline_s: float) -> bool:
    """End the process *pid* if it started at *start_ticks*; tell whether it ran.

    Through a pidfd, taken before the start time is compared: from then on the pid can't come to mean
    another process. Also waits for one that is dying already: while its last thread has not ended, its
    ports are taken.
    """
    if pid == 0:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        found = _stat(pid)
        if found is None or found.start_ticks != start_ticks:
            return False
        if found.is_dying:
            _has_ended(pidfd, pid, _KILL_S)
            return False
        if deadline_s > 0.0:
            _signal(pidfd, signal.SIGTERM)
            if _has_ended(pidfd, pid, deadline_s):
                return True
        _signal(pidfd, signal.SIGKILL)
        _has_ended(pidfd, pid, _KILL_S)
        return True
    finally:
        os.close(pidfd)


def _signal(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def _has_ended(pidfd: int, pid: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(timeout_s * 1000.0))
    if ended:
        _reap(pid)
    return ended


def _reap(pid: int) -> None:
    """Take a child's exit status, so that no zombie is left; nothing where it is no child of ours."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def _is_running(record: ProcessRecord) -> bool:
    if record.pid == 0 or record.boot_id != _boot_id():
        return False
    _reap(record.pid)
    return _start_ticks(record.pid) == record.start_ticks


class _Stat(NamedTuple):
    parent: int
    start_ticks: int
    #: Ended, or only its threads are left; its parent may not have looked yet (a zombie).
    is_dying: bool


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the command's name, in parentheses, may hold anything
    return _Stat(parent=int(fields[0]), start_ticks=int(fields[18]), is_dying=state in "ZX")


def _start_ticks(pid: int) -> int | None:
    """Return when *pid* started, None where it has ended or is about to."""
    found = _stat(pid)
    return None if found is None or found.is_dying else found.start_ticks


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _ancestry(pid: int) -> set[int]:
    found = set()
    while pid > 0 and (stat := _stat(pid)) is not None:
        found.add(pid)
        pid = stat.parent
    return found
