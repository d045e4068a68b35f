"""Build graphs as a driver writes them.

    base = image("debian:12")
    sources = local(".", exclude=["build", ".git"])
    built = base.run("apt-get install -y gcc", network="host").run("make", cwd="/src", mounts=[bind(sources, "/src")])
    result = scratch().copy(built, "/src/app", "/app")

A :class:`State` is a filesystem to be: immutable, and nothing is done to make one. ``result.definition()`` is what a
farm is asked to build; only that reads local directories.
"""

from __future__ import annotations

import math
import os
import posixpath
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cluster.digest import Digest
from cluster.errors import BuildArgumentError, EmptyGraphError
from cluster.graph import (
    BindMount,
    CacheMount,
    CopyAction,
    Definition,
    DiffOp,
    FileAction,
    FileOp,
    ImageOp,
    Limits,
    LocalOp,
    MakeDirectory,
    MakeFile,
    MergeOp,
    Network,
    Op,
    RunOp,
    SecretMount,
    Sharing,
    TmpfsMount,
    Vertex,
)
from cluster.patterns import PatternMatcher
from cluster.reference import parse_platform, parse_reference
from lazyfarm.context import ScannedTree, scan

_SHELL = ("/bin/sh", "-c")
_SECRETS = "/run/secrets"
_MAX_MODE = 0o7777
#: Characters of a bad argument that an error shows.
_MAX_SHOWN = 80

_Choice = TypeVar("_Choice", Network, Sharing)


# -- mounts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Bind:
    """A bind mount whose input has no number yet."""

    source: State
    mount: BindMount


Mount = _Bind | CacheMount | SecretMount | TmpfsMount


def bind(source: State, target: str, *, from_path: str = "/", read_only: bool = True) -> Mount:
    """Mount *source*, or *from_path* in it, at *target*. What is written there is dropped."""
    step = "bind()"
    _state(step, source)
    mount = BindMount(
        target=_mount_target(step, target),
        input=1,
        source=_rooted(step, "from_path", from_path),
        is_read_only=read_only,
    )
    return _Bind(source, mount)


def cache(
    target: str,
    *,
    id: str = "",  # noqa: A002 - what Dockerfiles call it
    sharing: str | Sharing = Sharing.SHARED,
    read_only: bool = False,
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
) -> Mount:
    """Mount a directory that outlives the command, at *target*; *id* names it within the farm (default: *target*).

    *sharing* says who may use it at the same time: ``shared`` everybody, ``locked`` one at a time, ``private`` one at a
    time, others meanwhile get another.
    """
    step = "cache()"
    at = _mount_target(step, target)
    return CacheMount(
        target=at,
        id=_text(step, "id", id) or at,
        sharing=_choice(step, "sharing", Sharing, sharing),
        is_read_only=read_only,
        mode=_mode(step, mode),
        uid=_number(step, "uid", uid),
        gid=_number(step, "gid", gid),
    )


def secret(
    id: str,  # noqa: A002 - what Dockerfiles call it
    *,
    target: str | None = None,
    env: str = "",
    required: bool = False,
    mode: int = 0o400,
    uid: int = 0,
    gid: int = 0,
) -> Mount:
    """Give the command the driver's secret *id*: as a file at *target*, in the variable *env*, or both.

    With neither it is ``/run/secrets/ID``. Not required and not given by the driver, it is left out. Its value is no
    part of the graph: the step counts as the same whatever it is.
    """
    step = "secret()"
    if not _text(step, "id", id):
        raise BuildArgumentError(step, "the id is empty")
    if target is None:
        target = "" if env else posixpath.join(_SECRETS, id)
    return SecretMount(
        id=id,
        target=_mount_target(step, target) if target else "",
        env=_variable(step, env) if env else "",
        is_required=required,
        mode=_mode(step, mode),
        uid=_number(step, "uid", uid),
        gid=_number(step, "gid", gid),
    )


def tmpfs(target: str, *, size_bytes: int = 0) -> Mount:
    """Mount an empty file system in memory at *target*, of at most *size_bytes* (0: the kernel's own limit)."""
    step = "tmpfs()"
    return TmpfsMount(target=_mount_target(step, target), size_bytes=_number(step, "size_bytes", size_bytes))


# -- states -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Directory:
    """A local directory that has not been read yet."""

    path: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A filesystem to be: a step over others. Made by :func:`image`, :func:`local`, :func:`scratch` and its methods.

    The methods return new states. Paths in them are from the filesystem's root, with or without a slash before them.
    """

    #: None: scratch.
    _step: Op | _Directory | None
    _inputs: tuple[State, ...] = ()
    _name: str = ""

    def __repr__(self) -> str:
        return f"State({self._name or self._step})"

    def run(
        self,
        args: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        user: str = "",
        hostname: str = "",
        mounts: Iterable[Mount] = (),
        network: str | Network = Network.NONE,
        memory_bytes: int = 0,
        cpus: float = 0.0,
        pids: int = 0,
        proxy_env: Mapping[str, str] | None = None,
    ) -> State:
        """Run a command in this filesystem; the result is the filesystem with what it changed.

        Args:
            args: The command; a string is given to ``/bin/sh -c``.
            env: Its whole environment. An image's own variables are not added.
            cwd: Directory that it runs in; made where it is not there.
            user: ``user[:group]``, by name or number; "" for root.
            hostname: "" for the farm's own choice.
            mounts: From :func:`bind`, :func:`cache`, :func:`secret` and :func:`tmpfs`.
            network: ``none`` or ``host``.
            memory_bytes: What it may use; 0: no limit.
            cpus: Likewise, for example 1.5.
            pids: Likewise, processes and threads.
            proxy_env: More variables, such as ``HTTP_PROXY``, that are no part of what the command is: with others it
                is the same command, and what it made is found again. Where *env* has one of them, that one counts. One
                with a user or a password is refused: graphs are at rest in Redis.

        Raises:
            BuildArgumentError: an argument that can't be meant.
        """
        step = "run()"
        command = (*_SHELL, args) if isinstance(args, str) else tuple(args)
        if not command or (isinstance(args, str) and not args.strip()):
            raise BuildArgumentError(step, "the command is empty")
        for one in command:
            _text(step, "args", one)
        given = _mounts(step, mounts)
        sources, binds = _numbered([one for one in given if isinstance(one, _Bind)])
        op = RunOp(
            args=command,
            env=_environment(step, "env", env),
            proxy_env=_proxies(step, proxy_env),
            cwd=_rooted(step, "cwd", cwd),
            user=_text(step, "user", user),
            hostname=_text(step, "hostname", hostname),
            network=_choice(step, "network", Network, network),
            binds=binds,
            caches=tuple(one for one in given if isinstance(one, CacheMount)),
            secrets=tuple(one for one in given if isinstance(one, SecretMount)),
            tmpfs=tuple(one for one in given if isinstance(one, TmpfsMount)),
            limits=Limits(
                memory_bytes=_number(step, "memory_bytes", memory_bytes),
                cpus=_cpus(step, cpus),
                pids=_number(step, "pids", pids),
            ),
        )
        return State(op, (self, *sources))

    def copy(
        self,
        source: State,
        from_path: str | Sequence[str],
        to_path: str,
        *,
        owner: str = "",
        mode: int | None = None,
        wildcards: bool = True,
        contents_only: bool = True,
        follow_symlinks: bool = False,
        allow_missing: bool = False,
        unpack: bool = False,
        exclude: Iterable[str] = (),
    ) -> State:
        """Copy from another filesystem into this one.

        Args:
            source: What is copied from; may be this state.
            from_path: Path or paths in it; with *wildcards*, patterns.
            to_path: Where to; a directory if it ends in a slash or there are several sources.
            owner: ``uid[:gid]``, or names looked up in this filesystem; "" keeps the source's.
            mode: Permission bits for what is copied; None keeps the source's.
            wildcards: Whether ``*``, ``?`` and ``[`` are special in *from_path*.
            contents_only: A directory brings what is in it, not itself.
            follow_symlinks: Where *from_path* is a symlink, copy what it points to.
            allow_missing: Nothing to copy is no error.
            unpack: Unpack sources that are tar archives.
            exclude: Patterns, as in ``.dockerignore``, of what is left out.

        Raises:
            BuildArgumentError: an argument that can't be meant.
            InvalidPatternError: a pattern in *exclude* is malformed.
        """
        step = "copy()"
        _state(step, source)
        paths = [from_path] if isinstance(from_path, str) else list(from_path)
        if not paths:
            raise BuildArgumentError(step, "there is no from_path")
        action = CopyAction(
            input=1,
            sources=tuple(_rooted(step, "from_path", path) for path in paths),
            destination=_destination(step, to_path),
            owner=_text(step, "owner", owner),
            mode=None if mode is None else _mode(step, mode),
            wildcards=wildcards,
            contents_only=contents_only,
            follow_symlinks=follow_symlinks,
            allow_missing=allow_missing,
            unpack=unpack,
            exclude=_patterns(step, "exclude", exclude),
        )
        return State(FileOp(actions=(action,)), (self, source))

    def mkdir(self, path: str, *, mode: int = 0o755, owner: str = "") -> State:
        """Make a directory and those above it; nothing where it is there."""
        step = "mkdir()"
        return self._file(
            MakeDirectory(path=_rooted(step, "path", path), mode=_mode(step, mode), owner=_text(step, "owner", owner))
        )

    def mkfile(self, path: str, data: str | bytes, *, mode: int = 0o644, owner: str = "") -> State:
        """Write a file, in place of one that is there; text as UTF-8."""
        step = "mkfile()"
        at = _rooted(step, "path", path)
        if at == "/":
            raise BuildArgumentError(step, "the path is the root")
        content = _text(step, "data", data, may_have_nul=True).encode() if isinstance(data, str) else bytes(data)
        return self._file(MakeFile(path=at, data=content, mode=_mode(step, mode), owner=_text(step, "owner", owner)))

    def diff(self, lower: State) -> State:
        """Return what this filesystem changes of *lower*: a filesystem with only these changes in it."""
        _state("diff()", lower)
        return State(DiffOp(), (lower, self))

    def named(self, name: str) -> State:
        """Give the step a name for people; it is no part of what the step is. No name is given to scratch."""
        return replace(self, _name=_text("named()", "name", name))

    def definition(self) -> Definition:
        """Return the graph that ends in this state, for a farm to build; reads its local directories.

        Raises:
            ScanError: a local directory can't be read.
            EmptyGraphError: it is scratch.
        """
        return resolve([self]).definition

    def _file(self, action: FileAction) -> State:
        return State(FileOp(actions=(action,)), (self,))


def image(reference: str, *, platform: str = "", plain_http: bool = False) -> State:
    """Return the filesystem of a registry's image; *platform* is ``os/architecture[/variant]``, "" the farm's own.

    Raises:
        InvalidReferenceError: the reference doesn't parse.
        InvalidPlatformError: the platform doesn't.
    """
    step = "image()"
    name = parse_reference(_text(step, "reference", reference)).name
    normal = str(parse_platform(_text(step, "platform", platform))) if platform else ""
    return State(ImageOp(reference=name, platform=normal, plain_http=plain_http))


def local(directory: str | os.PathLike[str], *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> State:
    """Return the filesystem of a directory of this machine; it is read when the definition is made.

    Everything belongs to root and has one fixed time. Only files that the farm lacks are sent.

    Args:
        directory: Relative to the working directory at the time of this call.
        include: Patterns as in ``.dockerignore``; where there are any, only what they match is taken.
        exclude: Patterns likewise; what they match is left out.

    Raises:
        InvalidPatternError: a pattern is malformed.
    """
    step = "local()"
    path = _text(step, "directory", os.fspath(directory))
    if not path:
        raise BuildArgumentError(step, "the directory is empty")
    absolute = str(Path(path).absolute())
    return State(_Directory(absolute, _patterns(step, "include", include), _patterns(step, "exclude", exclude)))


def scratch() -> State:
    """Return the empty filesystem."""
    return State(None)


def merge(states: Iterable[State]) -> State:
    """Return the layers of the states on top of one another, the first one lowest; nothing is copied."""
    step = "merge()"
    inputs = tuple(_state(step, state) for state in states)
    if not inputs:
        raise BuildArgumentError(step, "there is nothing to merge")
    return State(MergeOp(), inputs)


# -- definitions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A definition and the local directories in it."""

    definition: Definition
    #: By the digest of the tree, which is what the definition names.
    trees: Mapping[Digest, ScannedTree]


def resolve(targets: Sequence[State]) -> Resolved:
    """Build the definition of some states together, reading each local directory once.

    Steps that do nothing vanish: merging with scratch, or what a filesystem changes of itself.

    Raises:
        ScanError: a local directory can't be read.
        EmptyGraphError: no targets, or one that is scratch.
    """
    resolver = _Resolver()
    digests = [resolver.digest(_state("resolve()", target)) for target in targets]
    wanted = tuple(digest for digest in digests if digest is not None)
    if len(wanted) < len(digests):
        raise EmptyGraphError
    needed = resolver.needed(wanted)
    names = {digest: resolver.names.get(digest) or resolver.defaults[digest] for digest in needed}
    definition = Definition(needed, wanted, names)
    used = {vertex.op.tree for vertex in needed.values() if isinstance(vertex.op, LocalOp)}
    return Resolved(
        definition=definition, trees={digest: tree for digest, tree in resolver.trees.items() if digest in used}
    )


class _Resolver:
    """States on their way to vertices, each once."""

    def __init__(self) -> None:
        self.vertices: dict[Digest, Vertex] = {}
        #: What users call vertices: the first name, where several steps are one.
        self.names: dict[Digest, str] = {}
        #: What vertices are called otherwise.
        self.defaults: dict[Digest, str] = {}
        self.trees: dict[Digest, ScannedTree] = {}
        #: By the state's identity; held with the state, so that no other one gets its identity.
        self._done: dict[int, tuple[State, Digest | None]] = {}
        self._scanned: dict[_Directory, ScannedTree] = {}

    def digest(self, target: State) -> Digest | None:
        """Return the digest of a state's vertex, None for scratch; without recursion, as graphs are deep."""
        pending = [target]
        while pending:
            state = pending[-1]
            if id(state) in self._done:
                pending.pop()
                continue
            if missing := [below for below in state._inputs if id(below) not in self._done]:  # noqa: SLF001
                pending.extend(reversed(missing))
                continue
            inputs = tuple(self._done[id(below)][1] for below in state._inputs)  # noqa: SLF001
            self._done[id(state)] = (state, self._resolved(state, inputs))
            pending.pop()
        return self._done[id(target)][1]

    def needed(self, targets: Iterable[Digest]) -> dict[Digest, Vertex]:
        """Return the vertices that the targets are made of: what vanished may have left some behind."""
        needed: dict[Digest, Vertex] = {}
        pending = list(targets)
        while pending:
            digest = pending.pop()
            if digest not in needed:
                needed[digest] = self.vertices[digest]
                pending.extend(below for below in needed[digest].inputs if below is not None)
        return needed

    def _resolved(self, state: State, inputs: tuple[Digest | None, ...]) -> Digest | None:
        step = state._step  # noqa: SLF001 - states are opaque to their users
        digest = None if step is None else self._vertex(step, inputs)
        if digest is not None and state._name:  # noqa: SLF001
            self.names.setdefault(digest, state._name)  # noqa: SLF001
        return digest

    def _vertex(self, step: Op | _Directory, inputs: tuple[Digest | None, ...]) -> Digest | None:
        match step:
            case MergeOp():
                layers = tuple(below for below in inputs if below is not None)
                if len(layers) < 2:  # noqa: PLR2004 - merging takes two
                    return layers[0] if layers else None
                return self._add(step, layers, describe(step))
            case DiffOp() if inputs[0] is None:
                return inputs[1]
            case DiffOp() if inputs[0] == inputs[1]:
                return None
            case _Directory():
                if step not in self._scanned:
                    self._scanned[step] = scan(step.path, step.include, step.exclude)
                tree = self._scanned[step]
                self.trees.setdefault(tree.digest, tree)
                return self._add(LocalOp(tree=tree.digest), (), f"local {step.path}")
            case _:
                return self._add(step, inputs, describe(step))

    def _add(self, op: Op, inputs: tuple[Digest | None, ...], name: str) -> Digest:
        vertex = Vertex(op, inputs)
        self.vertices[vertex.digest] = vertex
        self.defaults.setdefault(vertex.digest, name)
        return vertex.digest


def describe(op: Op) -> str:
    """Return what an op is called where the user gives it no name."""
    match op:
        case ImageOp():
            return f"image {op.reference}" + (f" for {op.platform}" if op.platform else "")
        case LocalOp():
            return f"local {op.tree}"
        case RunOp():
            is_shell = op.args[:-1] == _SHELL
            return f"run {op.args[-1] if is_shell else shlex.join(op.args)}"
        case FileOp():
            return ", ".join(_describe_action(action) for action in op.actions)
        case MergeOp():
            return "merge"
        case DiffOp():
            return "diff"


def _describe_action(action: FileAction) -> str:
    match action:
        case CopyAction():
            return f"copy {' '.join(action.sources)} to {action.destination}"
        case MakeDirectory():
            return f"mkdir {action.path}"
        case MakeFile():
            return f"mkfile {action.path}"


# -- arguments ----------------------------------------------------------------------------------------


def _state(step: str, value: object) -> State:
    if not isinstance(value, State):
        raise BuildArgumentError(step, f"{_shown(value)} is not a state: use image(), local() or scratch()")
    return value


def _text(step: str, what: str, value: object, *, may_have_nul: bool = False) -> str:
    if not isinstance(value, str):
        raise BuildArgumentError(step, f"{what} is {_shown(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BuildArgumentError(step, f"{what} is {_shown(value)}, which is not Unicode") from None
    if "\0" in value and not may_have_nul:
        raise BuildArgumentError(step, f"{what} is {_shown(value)}, which has a NUL in it")
    return value


def _number(step: str, what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BuildArgumentError(step, f"{what} is {_shown(value)}, not a whole number from 0")
    return value


def _cpus(step: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise BuildArgumentError(step, f"cpus is {_shown(value)}, not a number from 0")
    return float(value)


def _mode(step: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_MODE:
        raise BuildArgumentError(step, f"mode is {_shown(value)}, not permission bits such as 0o755")
    return value


def _choice(step: str, what: str, enum: type[_Choice], value: str | _Choice) -> _Choice:
    try:
        return enum(value)
    except ValueError:
        choices = ", ".join(one.value for one in enum)
        raise BuildArgumentError(step, f"{what} is {_shown(value)}, not one of {choices}") from None


def _environment(step: str, what: str, env: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((_variable(step, k), _text(step, f"{what} {k}", v)) for k, v in (env or {}).items()))


def _proxies(step: str, env: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    given = _environment(step, "proxy_env", env)
    for name, value in given:
        authority = value.rpartition("://")[2].partition("/")[0]
        if "@" in authority:  # the value itself is not told: errors are logged
            reason = f"{name} holds a user or a password, which would rest in Redis with the graph"
            raise BuildArgumentError(step, f"{reason}: name a proxy that asks for none, one on the nodes for example")
    return given


def _variable(step: str, name: object) -> str:
    checked = _text(step, "the name of a variable", name)
    if not checked or "=" in checked:
        raise BuildArgumentError(step, f"{_shown(name)} is not the name of a variable")
    return checked


def _rooted(step: str, what: str, path: object) -> str:
    """Return a path from the root, without dots; what would climb above the root stays there, as in a shell."""
    checked = _text(step, what, path)
    if not checked:
        raise BuildArgumentError(step, f"{what} is empty")
    return posixpath.normpath("/" + checked.lstrip("/"))


def _destination(step: str, path: object) -> str:
    rooted = _rooted(step, "to_path", path)
    is_directory = str(path).endswith(("/", "/.", "/..")) or path in (".", "..")
    return rooted + "/" if is_directory and rooted != "/" else rooted


def _mount_target(step: str, path: object) -> str:
    if not _text(step, "target", path).startswith("/"):
        raise BuildArgumentError(step, f"target {_shown(path)} doesn't begin with a slash")
    rooted = _rooted(step, "target", path)
    if rooted == "/":
        raise BuildArgumentError(step, "target is the root, which is the state itself")
    return rooted


def _patterns(step: str, what: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise BuildArgumentError(step, f"{what} is one string, not a list of patterns")
    checked = tuple(_text(step, what, pattern) for pattern in patterns)
    PatternMatcher(checked)  # malformed ones are told here, where they were written
    return checked


def _mounts(step: str, mounts: Iterable[Mount]) -> list[Mount]:
    given = list(mounts)
    taken: set[str] = set()
    for one in given:
        if not isinstance(one, Mount):
            raise BuildArgumentError(step, f"{_shown(one)} is not a mount: use bind(), cache(), secret() or tmpfs()")
        target = one.mount.target if isinstance(one, _Bind) else one.target
        if target and target in taken:
            raise BuildArgumentError(step, f"two mounts are at {target}")
        taken.add(target)
    return given


def _numbered(binds: list[_Bind]) -> tuple[tuple[State, ...], tuple[BindMount, ...]]:
    """Return the inputs after the root, and the mounts with their numbers; a state mounted twice is one input."""
    sources = {id(one.source): one.source for one in binds}
    numbers = {key: number for number, key in enumerate(sources, 1)}
    return tuple(sources.values()), tuple(replace(one.mount, input=numbers[id(one.source)]) for one in binds)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
