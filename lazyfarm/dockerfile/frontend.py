"""From a directory to a build graph: the Dockerfile, what of the directory is sent, and the bases that a farm finds.

::

    built = await dockerfile_graph(farm, ".", target="app", args={"VERSION": "1.2"})
    result = await farm.solve(built.state, config=built.config)
"""

from __future__ import annotations

import os
import platform as machine
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import (
    DockerfileError,
    InvalidArgumentError,
    InvalidPatternError,
    InvalidReferenceError,
    ScanError,
)
from cluster.graph import Network
from cluster.patterns import PatternMatcher, read_ignore_file
from cluster.reference import ImageReference, Platform, default_platform, parse_platform, parse_reference
from lazyfarm import graph
from lazyfarm.dockerfile.convert import Base, BuildOptions, Converted, convert
from lazyfarm.dockerfile.instructions import Dockerfile, parse_dockerfile
from lazyfarm.dockerfile.stages import SCRATCH, ImageSource, LocalSource, NamedContext, context_key

#: What a Dockerfile is called that is read from standard input.
STDIN = "-"
_NAME = "Dockerfile"
_IGNORE_FILE = ".dockerignore"
_IMAGE_SCHEME = "docker-image://"
#: What buildx takes besides directories and images.
_OTHER_CONTEXT = re.compile(r"[a-z][a-z0-9+.-]*://|target:|[\w.-]+@[\w.-]+:", re.IGNORECASE)


class ResolvedImage(Protocol):
    """What a farm finds of an image."""

    @property
    def reference(self) -> ImageReference:
        """Its name, with the digest that it has now."""
        ...

    @property
    def config(self) -> bytes:
        """Its config (JSON)."""
        ...


class ImageResolver(Protocol):
    """The part of a farm that finds bases."""

    async def resolve(self, image: str, *, platform: str | None = None, plain_http: bool = False) -> ResolvedImage:
        """Read an image's config, for a platform; no layer is fetched."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSource:
    """What a build begins with."""

    dockerfile: Dockerfile
    #: The directory, without what its ignore file leaves out. Read when the graph is resolved.
    context: graph.State


async def dockerfile_graph(
    farm: ImageResolver,
    directory: str | os.PathLike[str],
    *,
    file: str | os.PathLike[str] | None = None,
    target: str = "",
    args: Mapping[str, str] | None = None,
    platform: str = "",
    network: Network | str = Network.HOST,
    plain_http: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    contexts: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Converted:
    """Return the graph and the image config of what a Dockerfile builds. Nothing runs, and no layer is fetched.

    Args:
        farm: Finds the bases; they are pinned by digest.
        directory: What COPY and ADD copy from, without what ``.dockerignore`` leaves out.
        file: The Dockerfile; None: ``Dockerfile`` in the directory. Its own ignore file is ``FILE.dockerignore``.
        target: A stage's name or number; "" for the last one.
        args: Build arguments. ``SOURCE_DATE_EPOCH`` gets to every command, and is the image's time.
        platform: ``os/architecture[/variant]`` of the image; "" for that of this machine.
        network: What commands see of the network where the Dockerfile doesn't say.
        plain_http: Registries, as ``HOST[:PORT]``, that are spoken to without TLS.
        labels: Labels of the image, over those in the Dockerfile.
        contexts: What FROM, ``COPY --from`` and ``RUN --mount=from=`` find under these names, instead of stages and
            images of them: a directory, without what its own ``.dockerignore`` leaves out, or ``docker-image://IMAGE``.

    Raises:
        DockerfileError: the Dockerfile, or the ignore file, can't be meant or is not supported; with the line.
        InvalidArgumentError, InvalidPlatformError: an argument can't be meant. ScanError: there is no such directory.
        ClusterError: a base can't be found.
    """
    options = build_options(
        target=target,
        args=args,
        platform=platform,
        network=network,
        plain_http=plain_http,
        labels=labels,
        contexts=contexts,
    )
    return await convert_source(farm, read_source(directory, file), options)


def build_options(
    *,
    target: str = "",
    args: Mapping[str, str] | None = None,
    platform: str = "",
    network: Network | str = Network.HOST,
    plain_http: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    contexts: Mapping[str, str | os.PathLike[str]] | None = None,
) -> BuildOptions:
    """Return checked options; arguments and errors as :func:`dockerfile_graph`."""
    here = default_platform(machine.machine())
    try:
        seen = Network(network)
    except ValueError:
        choices = ", ".join(one.value for one in Network)
        raise InvalidArgumentError("network", repr(network), f"it is one of {choices}") from None
    options = BuildOptions(
        platform=parse_platform(platform) if platform else here,
        build_platform=here,
        target=target,
        args=dict(args or {}),
        network=seen,
        plain_http=frozenset(plain_http),
        labels=dict(labels or {}),
        contexts=_named_contexts(contexts or {}),
    )
    _ = options.epoch_s  # raises where it is none
    return options


def _named_contexts(contexts: Mapping[str, str | os.PathLike[str]]) -> dict[str, NamedContext]:
    found: dict[str, NamedContext] = {}
    for name, value in contexts.items():
        what = f"the build context {name}"
        try:
            key = context_key(name)
        except InvalidReferenceError as exc:
            raise InvalidArgumentError("the name of a build context", repr(name), exc.reason) from exc
        if name.lower() == SCRATCH:
            raise InvalidArgumentError("the name of a build context", repr(name), "it is the empty image")
        if key in found:
            raise InvalidArgumentError(what, repr(os.fspath(value)), "another has that name, or means the same image")
        found[key] = _named_context(what, value)
    return found


def _named_context(what: str, value: str | os.PathLike[str]) -> NamedContext:
    text = os.fspath(value)
    if isinstance(value, str) and text.startswith(_IMAGE_SCHEME):
        try:
            return ImageSource(reference=parse_reference(text.removeprefix(_IMAGE_SCHEME)))
        except InvalidReferenceError as exc:
            raise InvalidArgumentError(what, repr(text), exc.reason) from exc
    if isinstance(value, str) and _OTHER_CONTEXT.match(text):
        raise InvalidArgumentError(what, repr(text), f"it is a directory of this machine, or {_IMAGE_SCHEME}IMAGE")
    root = Path(text).expanduser()
    if not text or not root.is_dir():
        raise InvalidArgumentError(what, repr(text), "there is no such directory")
    return LocalSource(state=_local(root, [root / _IGNORE_FILE]))


# -- what is read -----------------------------------------------------------------------------------------


def read_source(
    directory: str | os.PathLike[str],
    file: str | os.PathLike[str] | None = None,
    *,
    read_stdin: Callable[[], bytes] | None = None,
) -> BuildSource:
    """Read a Dockerfile and the ignore file that goes with it.

    Args:
        directory: See :func:`dockerfile_graph`.
        file: See :func:`dockerfile_graph`; ``-`` where *read_stdin* is given.
        read_stdin: Gives the Dockerfile that ``-`` stands for.

    Raises:
        DockerfileError, InvalidArgumentError, ScanError: as :func:`dockerfile_graph`.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ScanError(
            os.fspath(directory), "it is not a directory" if root.exists() else "there is no such directory"
        )
    path = Path(file) if file is not None else root / _NAME
    if os.fspath(path) == STDIN and read_stdin is not None:
        dockerfile = parse_dockerfile(read_stdin(), "<stdin>")
        ignore_files = [root / _IGNORE_FILE]
    else:
        dockerfile = parse_dockerfile(_read(path), str(path))
        ignore_files = [path.with_name(path.name + _IGNORE_FILE), root / _IGNORE_FILE]
    return BuildSource(dockerfile=dockerfile, context=_local(root, ignore_files))


def _local(root: Path, ignore_files: Iterable[Path]) -> graph.State:
    """Return a directory without what the first of the ignore files that is there leaves out."""
    found = next((one for one in ignore_files if one.is_file()), None)
    return graph.local(root, exclude=_read_ignored(found) if found else ())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidArgumentError("the Dockerfile", str(path), exc.strerror or str(exc)) from exc


def _read_ignored(path: Path) -> tuple[str, ...]:
    data = _read(path)
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise DockerfileError(str(path), data.count(b"\n", 0, exc.start) + 1, "it is not UTF-8 text") from exc
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        try:
            PatternMatcher(read_ignore_file(line))
        except InvalidPatternError as exc:
            raise DockerfileError(str(path), number, str(exc)) from exc
    return read_ignore_file(text)


# -- what is made of it -----------------------------------------------------------------------------------


async def convert_source(farm: ImageResolver, source: BuildSource, options: BuildOptions) -> Converted:
    """Return the graph of a source; raises as :func:`dockerfile_graph`."""

    async def find(reference: ImageReference, platform: Platform) -> Base:
        is_plain = bool({reference.host, reference.registry} & options.plain_http)
        found = await farm.resolve(reference.name, platform=str(platform), plain_http=is_plain)
        return Base(reference=found.reference, config=found.config)

    return await convert(source.dockerfile, source.context, options, find)


async def check_source(source: BuildSource, options: BuildOptions) -> Converted | None:
    """Find what is wrong with a source, as far as that can be told without its bases.

    Returns:
        What it would come to if its bases were empty; None where that can't be told.

    Raises:
        DockerfileError: as :func:`dockerfile_graph`.
    """

    async def find(reference: ImageReference, platform: Platform) -> Base:  # noqa: ARG001 - one is like the other here
        return Base(reference=reference, config=b"{}")

    try:
        return await convert(source.dockerfile, source.context, options, find)
    except DockerfileError as exc:
        # A variable may be one that the base sets: it is looked at again when the base is known.
        if exc.file == source.dockerfile.file and _has_variables(source.dockerfile, exc.line):
            return None
        raise


def _has_variables(dockerfile: Dockerfile, line: int) -> bool:
    """Tell whether an instruction in that line has variables, in its words or in what its heredocs hold."""
    instructions = (instruction for stage in dockerfile.stages for instruction in stage.instructions)
    return any("$" in repr(instruction) for instruction in instructions if instruction.line == line)
