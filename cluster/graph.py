"""Build graphs: ops, vertices and the definition that carries them, as plain checked values.

A vertex is an op over its inputs' vertices; its digest covers the op and the inputs' digests, so equal work has
equal digests in every driver. Each vertex has one output: a filesystem (a chain of layers, or nothing at all).
After BuildKit's LLB (``solver/pb``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.digest import Digest


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
