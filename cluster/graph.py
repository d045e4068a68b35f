"""Build graphs: ops, vertices and the definition that carries them, as plain checked values.

A vertex is an op over its inputs' vertices; its digest covers the op and the inputs' digests, so equal work has
equal digests in every driver. Each vertex has one output: a filesystem (a chain of layers, or nothing at all).
After BuildKit's LLB (``solver/pb``).

Ops are tagged with a kind and a version of it. A field may only be added to an op together with a new version:
to an older farm that ignored the field, the vertex would be other work under the same digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import msgspec

from cluster import wire
from cluster.digest import Digest, digest_of
from cluster.errors import (
    CycleError,
    EmptyGraphError,
    GraphError,
    InputCountError,
    InputIndexError,
    MalformedOpError,
    UnknownOpError,
    UnknownVertexError,
    UnneededVertexError,
    VertexDigestError,
)
from cluster.reference import parse_reference


class Network(Enum):
    """What a command sees of the network."""

    NONE = "none"
    HOST = "host"


class Sharing(Enum):
    """Who may use a cache mount at the same time."""

    SHARED = "shared"
    LOCKED = "locked"
    PRIVATE = "private"


@dataclass(frozen=True, slots=True, kw_only=True)
class BindMount:
    """Another vertex's filesystem, or a part of it. Changes made there are dropped."""

    target: str
    #: Which of the op's inputs (1 and up; 0 is the root).
    input: int
    source: str = "/"
    is_read_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMount:
    """A directory that outlives the command, on the node it ran on; never in a layer."""

    target: str
    #: Names it within the farm.
    id: str
    sharing: Sharing = Sharing.SHARED
    is_read_only: bool = False
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretMount:
    """A secret that the driver holds: as a file, as an environment variable, or both. Never stored, keyed or kept."""

    id: str
    #: Path of the file; "" for none.
    target: str = ""
    #: Name of the environment variable; "" for none.
    env: str = ""
    is_required: bool = False
    mode: int = 0o400
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TmpfsMount:
    """A file system in memory."""

    target: str
    #: Most bytes; 0: the kernel's own limit.
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a command may use; 0: no limit."""

    memory_bytes: int = 0
    #: CPUs, e.g. 1.5.
    cpus: float = 0.0
    pids: int = 0

    def __post_init__(self) -> None:
        # 1 and 1.0 are equal and must have one encoding, or equal vertices would have two digests.
        object.__setattr__(self, "cpus", float(self.cpus))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOp:
    """An image of a registry. No inputs."""

    #: As :func:`cluster.reference.parse_reference` normalises it.
    reference: str
    #: ``os/architecture[/variant]``; "" for the farm's own.
    platform: str = ""
    plain_http: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOp:
    """A directory of the driver, by its content. No inputs."""

    #: Digest of the tree's manifest (:mod:`cluster.tree`).
    tree: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOp:
    """A command in a container. Input 0 is its root; others are for bind mounts."""

    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"
    #: ``user[:group]``, by name or number; "" for root.
    user: str = ""
    hostname: str = ""
    network: Network = Network.NONE
    binds: tuple[BindMount, ...] = ()
    caches: tuple[CacheMount, ...] = ()
    secrets: tuple[SecretMount, ...] = ()
    tmpfs: tuple[TmpfsMount, ...] = ()
    limits: Limits = Limits()
    #: Variables that say by which way the command gets to what it fetches: no part of what it is, so of no digest and
    #: no cache key. Those in *env* go before them. Equal commands of two builds are one, which takes either's way.
    proxy_env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyAction:
    """Copy from an input into the output, as BuildKit's ``FileActionCopy``."""

    #: Which input (1 and up; 0 is what is copied into).
    input: int
    #: Paths or, with *wildcards*, patterns, from the input's root.
    sources: tuple[str, ...]
    #: A directory if it ends in "/" or there are several sources.
    destination: str
    #: ``uid[:gid]`` or names looked up in the output's passwd and group; "" keeps the source's.
    owner: str = ""
    #: Permission bits for what is copied; None keeps the source's.
    mode: int | None = None
    wildcards: bool = True
    #: A matching directory brings its contents, not itself (Dockerfile's rule).
    contents_only: bool = True
    #: Where a source is a symlink, copy what it points to.
    follow_symlinks: bool = False
    #: Nothing matching is no error.
    allow_missing: bool = False
    #: Unpack sources that are tar archives (``ADD``).
    unpack: bool = False
    #: Patterns, as in .dockerignore, of what is left out.
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeDirectory:
    """Make a directory and those above it; nothing where it is there."""

    path: str
    mode: int = 0o755
    owner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeFile:
    """Write a file."""

    path: str
    data: bytes
    mode: int = 0o644
    owner: str = ""


FileAction = CopyAction | MakeDirectory | MakeFile


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOp:
    """Changes to files, in order; together one layer. Input 0 is what is changed; others are copied from."""

    actions: tuple[FileAction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOp:
    """The inputs' layers on top of one another, the first one lowest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffOp:
    """What input 1 (upper) changes of input 0 (lower)."""


Op = ImageOp | LocalOp | RunOp | FileOp | MergeOp | DiffOp


# -- vertices -----------------------------------------------------------------------------------------

#: What the digest of a vertex and the encoding of a definition call an op, and the version of it that this release
#: writes and reads.
_OPS: dict[str, tuple[int, type[Op]]] = {
    "image": (1, ImageOp),
    "local": (1, LocalOp),
    "run": (1, RunOp),
    "file": (1, FileOp),
    "merge": (1, MergeOp),
    "diff": (1, DiffOp),
}
_TAGS: dict[type[Op], tuple[str, int]] = {cls: (kind, version) for kind, (version, cls) in _OPS.items()}
_ACTIONS: dict[str, type[FileAction]] = {"copy": CopyAction, "mkdir": MakeDirectory, "mkfile": MakeFile}
_ACTION_TAGS: dict[type[FileAction], str] = {cls: kind for kind, cls in _ACTIONS.items()}

_RUN_FIELDS = tuple(one.name for one in fields(RunOp) if one.name != "proxy_env")

_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Vertex:
    """An op over its inputs."""

    op: Op
    #: Digests of the vertices that it is over, in the op's order; None: scratch, an empty filesystem.
    inputs: tuple[Digest | None, ...] = ()
    #: Names what the op does and what it does it to; display names are no part of it.
    digest: Digest = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Fields are encoded in the order in which they are declared, sets and maps don't occur in ops: one vertex has
        # one encoding.
        object.__setattr__(self, "digest", digest_of(_encoder.encode((*_tagged(self.op), self.inputs))))

    @property
    def kind(self) -> str:
        """Return the op's kind: image, local, run, file, merge or diff."""
        return _TAGS[type(self.op)][0]


def _tagged(op: Op) -> tuple[str, int, object]:
    """Return an op's kind, version and body, as far as it is what the op does."""
    if isinstance(op, FileOp):
        # msgspec doesn't tell dataclasses of a union apart.
        return *_TAGS[FileOp], {"actions": [(_ACTION_TAGS[type(action)], action) for action in op.actions]}
    if isinstance(op, RunOp):
        # As it was before it had this field, so that what is cached stays so, and nodes of two releases agree.
        return *_TAGS[RunOp], {name: getattr(op, name) for name in _RUN_FIELDS}
    return *_TAGS[type(op)], op


def op_digest(op: Op) -> Digest:
    """Return the digest of an op by itself, whatever it is over. No vertex has the same one."""
    return digest_of(_encoder.encode(_tagged(op)))


def content_inputs(op: Op) -> tuple[int, ...]:
    """Return the inputs, by rising index, of which an op sees only files that can be told before it is carried out.

    For these, a digest of those files does as well in a cache key as the input's own keys: what file ops copy
    from, and what a command has mounted read-only. Never input 0, which becomes a part of the result.
    """
    match op:
        case FileOp(actions=actions):
            return tuple(sorted({action.input for action in actions if isinstance(action, CopyAction)}))
        case RunOp(binds=binds):
            writable = {bind.input for bind in binds if not bind.is_read_only}
            return tuple(sorted({bind.input for bind in binds} - writable))
        case _:
            return ()


# -- definitions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Definition:
    """A build graph: vertices by digest, and those whose results are wanted. Checked when it is made.

    Raises:
        EmptyGraphError: no targets.
        UnknownVertexError: an input, a target or a name is of a vertex that is not there.
        CycleError: a vertex needs itself.
        UnneededVertexError: no target needs a vertex.
        InputCountError: an op with another number of inputs than it takes.
        InputIndexError: a mount or copy from an input that is not there.
        MalformedOpError: a command without arguments, or a file op without actions.
        VertexDigestError: a vertex under a digest that is not its own.
    """

    vertices: Mapping[Digest, Vertex]
    #: At least one; what :class:`cluster.solver` returns results for, in this order.
    targets: tuple[Digest, ...]
    #: What people call vertices; not all need have one.
    names: Mapping[Digest, str] = field(default_factory=dict)
    #: Every vertex after its inputs.
    order: tuple[Digest, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.targets:
            raise EmptyGraphError
        for digest in (*self.targets, *self.names):
            if digest not in self.vertices:
                raise UnknownVertexError(digest, self.name(digest), "it is asked for and not in the definition")
        object.__setattr__(self, "order", tuple(self._ordered()))
        if len(self.order) < len(self.vertices):
            unneeded = min(self.vertices.keys() - set(self.order))
            raise self._fault(UnneededVertexError, unneeded, "no target needs it")
        for digest in self.order:
            self._check(digest, self.vertices[digest])

    def name(self, digest: Digest) -> str:
        """Return a vertex's display name; empty where it has none."""
        return self.names.get(digest, "")

    def _ordered(self) -> Iterator[Digest]:
        """Yield what the targets need, each vertex after its inputs: depth first, without recursion."""
        open_: dict[Digest, Iterator[Digest | None]] = {}  # from a target down to where the walk is
        done: set[Digest] = set()
        for target in self.targets:
            if target in done:
                continue
            open_[target] = iter(self.vertices[target].inputs)
            while open_:
                current = next(reversed(open_))
                for below in open_[current]:
                    if below is None or below in done:
                        continue
                    if below in open_:
                        raise self._fault(CycleError, below, "it needs its own result")
                    if below not in self.vertices:
                        reason = f"its input {below} is not in the definition"
                        raise self._fault(UnknownVertexError, current, reason)
                    open_[below] = iter(self.vertices[below].inputs)
                    break
                else:
                    del open_[current]
                    done.add(current)
                    yield current

    def _check(self, digest: Digest, vertex: Vertex) -> None:
        if vertex.digest != digest:
            raise self._fault(VertexDigestError, digest, f"its digest is {vertex.digest}")
        count = len(vertex.inputs)
        match vertex.op:
            case ImageOp() | LocalOp():
                self._check_count(digest, vertex, 0, 0)
            case DiffOp():
                self._check_count(digest, vertex, 2, 2)
            case MergeOp():
                self._check_count(digest, vertex, 2, count)
            case RunOp(args=args, binds=binds):
                self._check_count(digest, vertex, 1, count)
                self._check_used(digest, count, [(f"the mount at {bind.target}", bind.input) for bind in binds])
                if not args:
                    raise self._fault(MalformedOpError, digest, "the command is empty")
            case FileOp(actions=actions):
                self._check_count(digest, vertex, 1, count)
                copies = [action for action in actions if isinstance(action, CopyAction)]
                self._check_used(digest, count, [(f"the copy to {copy.destination}", copy.input) for copy in copies])
                if not actions:
                    raise self._fault(MalformedOpError, digest, "there is nothing to do")
                if any(not copy.sources for copy in copies):
                    raise self._fault(MalformedOpError, digest, "a copy has no sources")

    def _check_count(self, digest: Digest, vertex: Vertex, least: int, most: int) -> None:
        count = len(vertex.inputs)
        if not least <= count <= most:
            takes = str(least) if least == most else f"{least} or more"
            raise self._fault(InputCountError, digest, f"{vertex.kind} takes {takes} input(s), it has {count}")

    def _check_used(self, digest: Digest, count: int, uses: list[tuple[str, int]]) -> None:
        for what, index in uses:
            if not 1 <= index < count:
                reason = f"{what} is from input {index}, the last one is {count - 1} and 0 is the root"
                raise self._fault(InputIndexError, digest, reason)
        if unused := set(range(1, count)) - {index for _, index in uses}:
            raise self._fault(InputCountError, digest, f"nothing is done with input {min(unused)}")

    def _fault(self, error: type[GraphError], digest: Digest, reason: str) -> GraphError:
        return error(digest, self.name(digest), reason)


def image_registries(definition: Definition) -> frozenset[str]:
    """Return the hosts of the registries whose images a definition names."""
    ops = (vertex.op for vertex in definition.vertices.values())
    return frozenset(parse_reference(op.reference).host for op in ops if isinstance(op, ImageOp))


def pinned(definition: Definition, images: Mapping[ImageOp, ImageOp]) -> Definition:
    """Return a definition with other images in it, and so other digests for all that is built upon them."""
    if not images:
        return definition
    new: dict[Digest, Digest] = {}
    vertices: dict[Digest, Vertex] = {}
    for digest in definition.order:  # each after its inputs
        old = definition.vertices[digest]
        op = images.get(old.op, old.op) if isinstance(old.op, ImageOp) else old.op
        vertex = Vertex(op, tuple(None if below is None else new[below] for below in old.inputs))
        new[digest] = vertex.digest
        vertices[vertex.digest] = vertex
    names = {new[digest]: name for digest, name in definition.names.items()}
    return Definition(vertices, tuple(new[target] for target in definition.targets), names)


# -- payloads -----------------------------------------------------------------------------------------

_KIND = "definition"
_VERTEX_KIND = "vertex"


class _Row(msgspec.Struct, array_like=True):
    """A vertex in a payload."""

    digest: Digest
    kind: str
    version: int
    #: The op's fields, by its kind.
    fields: Any
    inputs: tuple[Digest | None, ...]


class _Body(msgspec.Struct):
    """The body of a definition's payload."""

    #: Every vertex after its inputs.
    vertices: list[_Row]
    targets: tuple[Digest, ...]
    names: dict[Digest, str] = {}


class _Targets(msgspec.Struct):
    """What of a definition's payload tells its targets by name."""

    targets: tuple[Digest, ...]
    names: dict[Digest, str] = {}


def encode_definition(definition: Definition) -> bytes:
    """Return a definition as a payload."""
    rows = [_row(definition.vertices[digest]) for digest in definition.order]
    return wire.encode(_KIND, _Body(vertices=rows, targets=definition.targets, names=dict(definition.names)))


def decode_definition(data: bytes) -> Definition:
    """Return the definition in a payload.

    Raises:
        UnknownVersionError: another release wrote it, in a form that is unknown here.
        MalformedPayloadError: it is truncated or no definition.
        UnknownOpError: a vertex is of an op, or a version of one, that is unknown here.
        MalformedOpError: a vertex's op has not the fields of its kind.
        GraphError: as :class:`Definition` raises.
    """
    body = wire.decode(_KIND, _Body, data)
    vertices = {row.digest: Vertex(_op(row, body.names.get(row.digest, "")), row.inputs) for row in body.vertices}
    return Definition(vertices, body.targets, body.names)


def decode_targets(data: bytes) -> dict[Digest, str]:
    """Return the names of the targets of the definition in a payload; cheap, as its vertices are not looked at.

    Raises:
        UnknownVersionError, MalformedPayloadError: as :func:`decode_definition`.
    """
    body = wire.decode(_KIND, _Targets, data)
    return {target: body.names.get(target, "") for target in body.targets}


def encode_vertex(vertex: Vertex) -> bytes:
    """Return one vertex as a payload: what a worker is sent."""
    return wire.encode(_VERTEX_KIND, _row(vertex))


def decode_vertex(data: bytes) -> Vertex:
    """Return the vertex in a payload; raises as :func:`decode_definition`."""
    row = wire.decode(_VERTEX_KIND, _Row, data)
    vertex = Vertex(_op(row, ""), row.inputs)
    if vertex.digest != row.digest:
        raise VertexDigestError(row.digest, "", f"its digest is {vertex.digest}")
    return vertex


def _row(vertex: Vertex) -> _Row:
    kind, version, body = _tagged(vertex.op)
    return _Row(vertex.digest, kind, version, vertex.op if isinstance(vertex.op, RunOp) else body, vertex.inputs)


def _op(row: _Row, name: str) -> Op:
    """Return a row's op; *name* is what the vertex is called in errors."""
    digest, kind = row.digest, row.kind
    known = _OPS.get(kind)
    if known is None:
        raise UnknownOpError(digest, name, f"there is no op {kind!r}")
    version, cls = known
    if row.version != version:
        raise UnknownOpError(digest, name, f"version {row.version} of op {kind!r} is unknown, {version} is known")
    try:
        if cls is FileOp:
            actions = msgspec.convert(row.fields, _FileBody).actions
            for action, _ in actions:
                if action not in _ACTIONS:
                    raise UnknownOpError(digest, name, f"there is no file action {action!r}")
            return FileOp(actions=tuple(msgspec.convert(body, _ACTIONS[action]) for action, body in actions))
        return msgspec.convert(row.fields, cls)
    except (msgspec.ValidationError, ValueError, RecursionError) as exc:
        raise MalformedOpError(digest, name, f"{kind}: {exc}") from exc


class _FileBody(msgspec.Struct):
    """The body of a file op."""

    actions: list[tuple[str, Any]]
