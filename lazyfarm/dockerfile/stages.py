"""Which stages a target needs, and what each is built upon. Global arguments are known here; no image is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cluster.errors import DockerfileError, InvalidPlatformError, InvalidReferenceError
from cluster.reference import ImageReference, Platform, parse_platform, parse_reference
from lazyfarm import graph
from lazyfarm.dockerfile.expand import expand
from lazyfarm.dockerfile.instructions import Copy, Dockerfile, From, Run
from lazyfarm.dockerfile.refused import RefusedError

#: What FROM calls the empty image.
SCRATCH = "scratch"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSource:
    """A stage of the same file."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """An image of a registry."""

    reference: ImageReference


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A directory that the build names."""

    state: graph.State


#: What a build names besides its own directory.
NamedContext = ImageSource | LocalSource


def context_key(name: str) -> str:
    """Return what contexts are found by: as in BuildKit, ``debian`` is ``docker.io/library/debian:latest``.

    Raises:
        InvalidReferenceError: no stage and no image can be called so.
    """
    return parse_reference(name.lower()).name


def platform_args(target: Platform, build: Platform) -> dict[str, str]:
    """Return the arguments that say for what, and on what, is built."""
    return {
        f"{prefix}{name}": value
        for prefix, platform in (("TARGET", target), ("BUILD", build))
        for name, value in (
            ("PLATFORM", str(platform)),
            ("OS", platform.os),
            ("ARCH", platform.architecture),
            ("VARIANT", platform.variant),
        )
    }


class StageTable:
    """A Dockerfile's stages by name and number."""

    def __init__(
        self,
        dockerfile: Dockerfile,
        args: Mapping[str, str],
        platforms: Mapping[str, str],
        contexts: Mapping[str, NamedContext] = MappingProxyType({}),
    ) -> None:
        """Evaluate the global arguments.

        Args:
            dockerfile: The Dockerfile.
            args: The build arguments given.
            platforms: See :func:`platform_args`; *args* overrides them.
            contexts: By :func:`context_key`; they take the place of stages and images of these names.

        Raises:
            DockerfileError: a global argument's default can't be expanded.
        """
        self._file = dockerfile
        self._contexts = contexts
        #: What FROM may use, and a stage's ARG without a default.
        self.globals = {name: args.get(name, value) for name, value in platforms.items()}
        for arg in dockerfile.global_args:
            for name, default in arg.items:
                if name in args:
                    self.globals[name] = args[name]
                elif default is not None:
                    self.globals[name] = self._expand(default, arg.line)
        self._names = {stage.start.name: at for at, stage in enumerate(dockerfile.stages) if stage.start.name}

    def target(self, name: str) -> int:
        """Return the number of the stage to build: by name or number, the last one for "".

        Raises:
            DockerfileError: there is none.
        """
        stages = self._file.stages
        if not name:
            return len(stages) - 1
        if name.lower() in self._names:
            return self._names[name.lower()]
        if name.isdecimal() and int(name) < len(stages):
            return int(name)
        known = ", ".join(sorted(self._names)) or "none has a name"
        raise DockerfileError(self._file.file, stages[-1].start.line, f"there is no stage {name!r} (stages: {known})")

    def replaced(self, index: int) -> NamedContext | None:
        """Return the context that takes the place of a stage, with all that it does."""
        name = self._file.stages[index].start.name
        return self._context(name) if name else None

    def base(self, index: int) -> StageSource | NamedContext | None:
        """Return what a stage is built upon; None for nothing.

        Raises:
            DockerfileError: it is no reference.
        """
        start = self._file.stages[index].start
        base = self._expand(start.base, start.line)
        if not base:
            raise DockerfileError(
                self._file.file, start.line, f"the base {start.base} is empty: no ARG gives it a value"
            )
        earlier = [at for at in range(index) if self._file.stages[at].start.name == base.lower()]
        if earlier:
            return StageSource(index=earlier[-1])
        return None if base == SCRATCH else self._context(base) or self._image(base, start.line)

    def platform(self, index: int, default: Platform) -> Platform:
        """Return a stage's platform.

        Raises:
            DockerfileError: it is none.
        """
        start = self._file.stages[index].start
        text = self._expand(start.platform, start.line)
        if start.platform and not text:
            raise DockerfileError(self._file.file, start.line, f"the platform {start.platform} is empty")
        if text and "/" not in text:
            # An architecture alone is one of the same system, as containerd's platforms package has it.
            text = f"{default.os}/{text}"
        try:
            return parse_platform(text) if text else default
        except InvalidPlatformError as exc:
            raise DockerfileError(self._file.file, start.line, str(exc)) from exc

    def source(self, text: str, line: int) -> StageSource | NamedContext:
        """Return what a ``--from`` names.

        Raises:
            DockerfileError: nothing that can be.
        """
        if "$" in text:
            what = f"--from={text} can't hold variables: begin a stage with FROM {text} AS NAME and name that"
            raise DockerfileError(self._file.file, line, what)
        if text.lower() in self._names:
            return StageSource(index=self._names[text.lower()])
        if text.isdecimal():
            if int(text) >= len(self._file.stages):
                raise DockerfileError(self._file.file, line, f"there is no stage {text}; the first one is 0")
            return StageSource(index=int(text))
        return self._context(text) or self._image(text, line)

    def needed(self, target: int) -> list[int]:
        """Return the stages that *target* needs, each after those that it needs itself, it the last.

        Raises:
            DockerfileError: stages need each other, or one names what can't be.
        """
        order: list[int] = []
        open_ = {target: self._needs(target)}  # from the target down to where the walk is
        while open_:
            current = next(reversed(open_))
            for below, line in open_[current]:
                if below in open_:
                    start = self._file.stages[below].start
                    name = start.name or str(below)
                    raise DockerfileError(
                        self._file.file, line, f"stage {name} (line {start.line}) needs its own result"
                    )
                if below not in order:
                    open_[below] = self._needs(below)
                    break
            else:
                del open_[current]
                order.append(current)
        return order

    def _needs(self, index: int) -> Iterator[tuple[int, int]]:
        """Yield the stages that one needs, each with the line that says so."""
        if self.replaced(index) is not None:
            return
        start: From = self._file.stages[index].start
        base = self.base(index)
        if isinstance(base, StageSource):
            yield base.index, start.line
        for instruction in self._file.stages[index].instructions:
            match instruction:
                case Copy(source=source) if source:
                    names = [source]
                case Run(mounts=mounts):
                    names = [mount["from"] for mount in mounts if mount.get("from")]
                case _:
                    continue
            for name in names:
                found = self.source(name, instruction.line)
                if isinstance(found, StageSource):
                    yield found.index, instruction.line

    def _context(self, name: str) -> NamedContext | None:
        try:
            return self._contexts.get(context_key(name))
        except InvalidReferenceError:
            return None

    def _image(self, text: str, line: int) -> ImageSource:
        try:
            return ImageSource(reference=parse_reference(text))
        except InvalidReferenceError as exc:
            raise DockerfileError(self._file.file, line, str(exc)) from exc

    def _expand(self, text: str, line: int) -> str:
        try:
            return expand(text, self.globals, self._file.escape)
        except RefusedError as exc:
            raise DockerfileError(self._file.file, line, str(exc)) from exc
