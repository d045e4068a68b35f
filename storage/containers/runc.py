"""Commands run by ``runc``: one container each, gone with all that was made for it when the command ends.

``runc run`` stays in the foreground and hands the exit code on. Whoever stops waiting, by cancellation or
deadline, has the whole container killed before the call returns; what a killed process of ours leaves
behind, :meth:`Runc.recover` removes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from cluster.errors import (
    ContainerError,
    DeadlineExceededError,
    FileActionError,
    InternalError,
    ProcessFailedError,
    ProcessNotStartedError,
    ProcessOutOfMemoryError,
    RuntimeMissingError,
    first_error,
)
from cluster.graph import CacheMount, Network, RunOp
from cluster.job import LogStream
from storage.containers import bundle as bundles
from storage.containers import secrets as op_secrets
from storage.containers.bundle import Bundle
from storage.containers.caches import Caches
from storage.containers.cgroups import Cgroups
from storage.containers.logs import LineReader, LogLine, LogSink
from storage.containers.mount_points import MountPoints
from storage.containers.spec import DEFAULT_HOSTNAME, SYSTEM_TARGETS, Mount, bind, runtime_spec, tmpfs
from storage.containers.users import Owner, ProcessUser, find_user
from storage.file_ops.copy import new_directory
from storage.file_ops.faults import naming
from storage.file_ops.paths import Target, components, directory_tree, find
from storage.snapshots.names import shown
from storage.snapshots.tree import Node
from storage.to_the_end import to_the_end

#: Where Debian keeps runc, and an ordinary user's PATH doesn't look.
_PATHS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_COMMAND_S: Final = 30.0
#: After a kill, until runc itself is killed.
_GOES_WITHIN_S: Final = 10.0
#: A line without an end is shown after this long without more of it.
_QUIET_S: Final = 0.5
_READ_BYTES: Final = 64 << 10
_LAST_LINES: Final = 20
_LAST_LINE_CHARACTERS: Final = 1000
#: What runc says where the fault is the command's and not the node's.
_NOT_STARTED: Final = re.compile(r"container (?:process|init): ((?:exec|chdir).*)", re.DOTALL)


class Runc:
    """Runs commands in containers on this node. Needs root.

    Args:
        root: A directory of the node for bundles, runc's records and cache mounts; its user's alone.
        command: The runtime; None: runc, where it is found.
    """

    def __init__(self, root: Path, *, command: str | None = None) -> None:
        self._root = root.absolute()
        self._bundles = self._root / "bundles"
        self._state = self._root / "runc"
        self._caches = Caches.of_node(self._root)
        self._command = command
        self._cgroups: Cgroups | None = None

    async def run(
        self,
        op: RunOp,
        root: Path,
        *,
        binds: Mapping[int, Path],
        secrets: Mapping[str, bytes],
        log: LogSink,
        timeout_s: float,
    ) -> None:
        """Run the op's command to its end; what it changes in *root* stays, what was made for mounts doesn't.

        Args:
            op: What to run, and how.
            root: A writable directory that nobody else uses: a mounted workspace, say.
            binds: Where the inputs of bind mounts lie on this node, by their index. Those that are mounted
                writable are changed.
            secrets: Values by ID; those that the op doesn't name are not looked at.
            log: Takes what the command says.
            timeout_s: Longest that the command may take, waiting for caches included.

        Raises:
            ProcessFailedError, ProcessOutOfMemoryError: it ended with another exit code than 0.
            ProcessNotStartedError: there is no such command, or it can't be executed.
            MissingSecretError, UnusableSecretError, UnknownUserError: as their names say.
            FileActionError: the working directory or a mount's source or target can't be.
            LimitUnavailableError: a limit can't be kept on this node.
            RuntimeMissingError: there is no runc here, or we are not root.
            DeadlineExceededError: *timeout_s* have passed; the container is gone.
            ContainerError: the node failed.
        """
        runtime, cgroups = await to_the_end(asyncio.to_thread(self._prepare))
        cgroups.check(op.limits)
        used = op_secrets.given(op, secrets)
        env = dict(op.proxy_env) | dict(op.env) | op_secrets.environment(used)
        container = _Container(
            op=op, root=root, binds=binds, runtime=runtime, cgroups=cgroups, home=self._bundles, state=self._state
        )
        try:
            async with asyncio.timeout(timeout_s), AsyncExitStack() as stack:
                caches = [(mount, await stack.enter_async_context(self._caches.use(mount))) for mount in op.caches]
                await container.run(env, used, caches, log)
        except TimeoutError as exc:
            raise DeadlineExceededError(
                f"running {' '.join(op.args)!r}", f"not done within {timeout_s:g} s; it was killed"
            ) from exc

    def recover(self) -> list[str]:
        """Remove what killed processes left: containers, bundles, cgroups; return their IDs. Blocks.

        Containers of live processes, of this one too, are left alone.

        Raises:
            ContainerError: something can't be removed.
        """
        if not self._bundles.is_dir():
            return []
        known = [entry.name for entry in self._state.iterdir()] if self._state.is_dir() else []
        left = bundles.abandoned(self._bundles, known)
        if left:
            runtime, cgroups = self._prepare()
            for container in left:
                runtime.delete(container)
                cgroups.clear(container)
                bundles.forget(self._bundles, container)
        return left

    def _prepare(self) -> tuple[_Runtime, Cgroups]:
        command = self._command or shutil.which("runc") or shutil.which("runc", path=os.pathsep.join(_PATHS))
        if command is None or shutil.which(command) is None:
            raise RuntimeMissingError("running a container", f"{self._command or 'runc'} is not installed on this node")
        if os.geteuid() != 0:
            raise RuntimeMissingError("running a container", "this node's processes don't run as root")
        try:
            for directory in (self._root, self._bundles, self._state):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ContainerError(f"opening {self._root}", str(exc)) from exc
        if self._cgroups is None:
            self._cgroups = Cgroups()
        return _Runtime(command, self._state, has_cgroups=self._cgroups.are_writable), self._cgroups


class _Runtime:
    """The runtime's command line."""

    def __init__(self, command: str, state: Path, *, has_cgroups: bool) -> None:
        # With `rootless` it puts up with cgroups that can't be written.
        self._base = [command, "--root", str(state), *([] if has_cgroups else ["--rootless", "true"])]

    def start(self, container: str, bundle: Path) -> subprocess.Popen[bytes]:
        """Start the container of a bundle in the foreground; its cgroup stays until :meth:`delete`."""
        try:
            return subprocess.Popen(  # noqa: S603  # found on our own path
                [
                    *self._base,
                    *("--log", str(bundle / "runc.log"), "--log-format", "json"),
                    *("run", "--keep", "--bundle", str(bundle), "--pid-file", str(bundle / "pid"), container),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                # Nothing of ours is its business; what it execs has its own.
                env={"PATH": os.environ.get("PATH", os.defpath)},
                # A terminal's interrupt is for us to act on.
                start_new_session=True,
            )
        except OSError as exc:
            raise ContainerError("starting a container", str(exc)) from exc

    def kill(self, container: str) -> None:
        """Kill a container's processes; does nothing where there is none. Blocks."""
        self._call(["kill", "--all", container, "KILL"])

    def delete(self, container: str) -> None:
        """Kill and remove a container; does nothing where there is none. Blocks.

        Raises:
            ContainerError: it is still there.
        """
        done = self._call(["delete", "--force", container])
        if done.returncode:
            raise ContainerError(f"removing container {container}", done.stderr.strip())

    def _call(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(  # noqa: S603  # found on our own path
                [*self._base, *words], capture_output=True, text=True, timeout=_COMMAND_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise ContainerError(f"runc {words[0]}", str(exc)) from exc


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a container ended."""

    exit_code: int
    #: Whether the command itself was started; else *reason* is why not.
    was_started: bool
    reason: str
    oom_kills: int


class _Container:
    """One container, from its bundle to its removal."""

    def __init__(
        self,
        *,
        op: RunOp,
        root: Path,
        binds: Mapping[int, Path],
        runtime: _Runtime,
        cgroups: Cgroups,
        home: Path,
        state: Path,
    ) -> None:
        self._id = uuid.uuid4().hex
        self._op = op
        self._root = root
        self._binds = binds
        self._runtime = runtime
        self._cgroups = cgroups
        self._bundle = Bundle(home, self._id)
        self._state = state
        self._cleanup = ExitStack()
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    async def run(
        self,
        env: Mapping[str, str],
        secrets: list[tuple[Any, bytes]],
        caches: Sequence[tuple[CacheMount, Path]],
        log: LogSink,
    ) -> None:
        """Run it to its end."""
        try:
            await to_the_end(asyncio.to_thread(self._set_up, env, secrets, caches))
            exit_code = await self._execute([value for _, value in secrets], log)
            outcome = await to_the_end(asyncio.to_thread(self._read_outcome, exit_code))
        except BaseException as exc:
            # What went wrong first is what is told; what can't be removed now, `recover` finds.
            with suppress(ContainerError):
                await to_the_end(asyncio.to_thread(self._clean_up))
            if isinstance(exc, OSError) and not isinstance(exc, TimeoutError):
                raise ContainerError("running a container", str(exc)) from exc
            raise
        await to_the_end(asyncio.to_thread(self._clean_up))
        self._judge(outcome)

    def _clean_up(self) -> None:
        try:
            self._cleanup.close()
        except OSError as exc:
            raise ContainerError("removing a container", str(exc)) from exc

    # -- before --

    def _set_up(
        self, env: Mapping[str, str], secrets: list[tuple[Any, bytes]], caches: Sequence[tuple[CacheMount, Path]]
    ) -> None:
        op = self._op
        target = Target(self._root)
        user = find_user(target.tree, op.user)
        self._cleanup.enter_context(self._bundle)
        # Whatever happens from here on, nothing of the container is left.
        self._cleanup.callback(self._cgroups.clear, self._id)
        points = MountPoints(target)
        self._cleanup.callback(points.remove)
        self._cleanup.callback(self._runtime.delete, self._id)
        mounts = [*self._resolver_mounts(), *self._op_mounts(caches)]
        mounts += [
            replace(mount, target=_absolute(mount.target, op.cwd))
            for mount in op_secrets.write_files(secrets, self._bundle.path)
        ]
        cwd = _absolute(op.cwd)
        with naming("make directory", op.cwd, root=str(self._root)):
            self._make_cwd(target, cwd, user, mounts)
        for mount in mounts:
            if not components(mount.target):
                raise FileActionError("mount on", mount.target, "the root is mounted already")
            is_directory = mount.type != "bind" or Path(mount.source).is_dir()
            with naming("mount on", mount.target, root=str(self._root)):
                points.make(mount.target, is_directory=is_directory)
        for path in SYSTEM_TARGETS:
            with naming("mount on", path, root=str(self._root)):
                points.make(path, is_directory=True)
        spec = runtime_spec(
            args=op.args,
            env=env,
            cwd=cwd,
            user=user,
            root=self._root.absolute(),
            mounts=mounts,
            hostname=op.hostname,
            network=op.network,
            limits=op.limits,
            cgroup=self._cgroups.path_for(self._id),
        )
        self._bundle.write("config.json", json.dumps(spec))

    def _make_cwd(self, target: Target, cwd: str, user: ProcessUser, mounts: Sequence[Mount]) -> None:
        within = [mount.target.rstrip("/") for mount in mounts] + list(SYSTEM_TARGETS)
        if any(cwd == path or cwd.startswith(path + "/") for path in within):
            return  # in what is mounted there, not in the root: runc sees to it
        found = find(target.tree, cwd)
        target.make_directories(found, new_directory(Owner(uid=user.uid, gid=user.gid)))

    def _resolver_mounts(self) -> list[Mount]:
        op = self._op
        name = op.hostname or DEFAULT_HOSTNAME
        hosts = f"127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        resolver = ""
        if op.network is Network.HOST:
            hosts = _read("/etc/hosts") or hosts
            resolver = _read("/etc/resolv.conf")
        return [
            bind(str(self._bundle.write(file, text, mode=0o644)), f"/etc/{file}", is_read_only=True)
            for file, text in (("resolv.conf", resolver), ("hosts", hosts))
        ]

    def _op_mounts(self, caches: Sequence[tuple[CacheMount, Path]]) -> list[Mount]:
        mounts: list[Mount] = []
        for mount in self._op.binds:
            if mount.input not in self._binds:
                raise InternalError(f"a bind mount of input {mount.input}, which was not given")
            with naming("bind", mount.source, root=str(self._binds[mount.input])):
                node: Node = find(directory_tree(self._binds[mount.input]), mount.source).require()
            source = os.fsdecode(node.path)
            mounts.append(bind(source, _absolute(mount.target, self._op.cwd), is_read_only=mount.is_read_only))
        for cache, path in caches:
            target = _absolute(cache.target, self._op.cwd)
            mounts.append(bind(str(path), target, is_read_only=cache.is_read_only))
        mounts += [tmpfs(_absolute(each.target, self._op.cwd), size_bytes=each.size_bytes) for each in self._op.tmpfs]
        return mounts

    # -- meanwhile --

    async def _execute(self, secrets: Sequence[bytes], log: LogSink) -> int:
        """Run the container; return runc's exit code. No process of it is left, however this ends."""
        process = self._runtime.start(self._id, self._bundle.path)
        assert process.stdout is not None  # noqa: S101  # asked for
        assert process.stderr is not None  # noqa: S101  # asked for
        try:
            exited = _Exit(process)
        except OSError as exc:
            process.kill()
            process.wait()
            raise ContainerError("watching a container", str(exc)) from exc
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(process.stdout, LogStream.STDOUT, secrets, log))
                tasks.create_task(self._read(process.stderr, LogStream.STDERR, secrets, log))
                await exited.wait()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        finally:
            await to_the_end(self._stop(exited))
        return process.returncode

    async def _stop(self, exited: _Exit) -> None:
        try:
            if not exited.is_over:
                with suppress(ContainerError):
                    await asyncio.to_thread(self._runtime.kill, self._id)
                try:
                    async with asyncio.timeout(_GOES_WITHIN_S if self._is_known() else 0.1):
                        await exited.wait()
                except TimeoutError:
                    # Not so far yet that there is a container, or stuck: what it made is removed with the rest.
                    exited.process.kill()
                    await exited.wait()
        finally:
            exited.close()
            for pipe in (exited.process.stdout, exited.process.stderr):
                if pipe is not None:
                    pipe.close()

    def _is_known(self) -> bool:
        return (self._state / self._id / "state.json").exists()

    async def _read(self, pipe: IO[bytes], stream: LogStream, secrets: Sequence[bytes], log: LogSink) -> None:
        """Hand on what comes through a pipe until its end."""
        lines = LineReader(stream, secrets)
        reader = asyncio.StreamReader(limit=_READ_BYTES)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while True:
                try:
                    async with asyncio.timeout(_QUIET_S if lines.has_rest else None):
                        data = await reader.read(_READ_BYTES)
                except TimeoutError:
                    await self._tell(lines.flush(), log)
                    continue
                if not data:
                    break
                await self._tell(lines.feed(data), log)
            await self._tell(lines.end(), log)
        finally:
            transport.close()

    async def _tell(self, lines: Sequence[LogLine], log: LogSink) -> None:
        if lines:
            self._last.extend(line.text[:_LAST_LINE_CHARACTERS] for line in lines)
            await log(lines)

    # -- after --

    def _read_outcome(self, exit_code: int) -> _Outcome:
        was_started = (self._bundle.path / "pid").exists()
        return _Outcome(
            exit_code=exit_code,
            was_started=was_started,
            reason="" if was_started else _reason_in(_read(str(self._bundle.path / "runc.log"))),
            oom_kills=self._cgroups.oom_kills(self._id),
        )

    def _judge(self, outcome: _Outcome) -> None:
        if not outcome.was_started:
            theirs = _NOT_STARTED.search(outcome.reason)
            if theirs is not None:
                raise ProcessNotStartedError(self._op.args, theirs[1])
            raise ContainerError("starting a container", outcome.reason or f"runc: exit code {outcome.exit_code}")
        if outcome.exit_code:
            kind = ProcessOutOfMemoryError if outcome.oom_kills else ProcessFailedError
            raise kind(self._op.args, outcome.exit_code, tuple(self._last))


class _Exit:
    """The end of a process, waited for through its descriptor: no thread, no signal handler."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._fd = os.pidfd_open(process.pid)
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._fd, self._set)

    @property
    def is_over(self) -> bool:
        """Tell whether it has ended."""
        return self._over.done()

    async def wait(self) -> None:
        """Wait for it."""
        await asyncio.shield(self._over)

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _set(self) -> None:
        self._loop.remove_reader(self._fd)
        self.process.wait()
        if not self._over.done():
            self._over.set_result(None)


def _absolute(path: str, base: str = "/") -> str:
    """Return *path* from the root, cleaned; relative ones start at *base*."""
    return "/" + shown(b"/".join(components(path if path.startswith("/") else f"{base}/{path}")))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _reason_in(log: str) -> str:
    """Return the last error in runc's log."""
    for line in reversed(log.splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
            return str(entry.get("msg", ""))
    return ""
