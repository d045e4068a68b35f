"""Instructions of a Dockerfile, typed, each with its line. Nothing is expanded yet.

What is written wrongly is refused here, in every stage; what is not supported only where a target needs it
(:mod:`lazyfarm.dockerfile.convert`). After BuildKit's ``frontend/dockerfile/instructions``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from cluster.errors import DockerfileError
from lazyfarm.dockerfile.expand import raw_words
from lazyfarm.dockerfile.parser import Heredoc, Source, Statement, parse_opener, read_json_words, read_statements
from lazyfarm.dockerfile.refused import RefusedError

_STAGE_NAME = re.compile(r"[a-z][a-z0-9._-]*\Z")
_DURATION = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h)")
_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
#: Docker refuses shorter ones than 1 ms, 0 aside (the default).
_LEAST_DURATION_NS = 10**6
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What RUN, CMD and the like are given."""

    #: Exec form: the words. Shell form: one, as written, for the shell.
    args: tuple[str, ...]
    is_shell: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What all have."""

    #: From 1.
    line: int
    #: For people: the instruction on one line.
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class From(Instruction):
    """Begins a stage."""

    #: An image, an earlier stage, or ``scratch``; unexpanded.
    base: str
    #: ``--platform``, unexpanded; "" for the target's.
    platform: str = ""
    #: In lower case; "" for none.
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arg(Instruction):
    """Build arguments, with their defaults."""

    items: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Env(Instruction):
    """Environment variables."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Label(Instruction):
    """Labels of the image."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Instruction):
    """A command that makes a layer."""

    command: Command
    heredocs: tuple[Heredoc, ...] = ()
    #: Each ``--mount``: its fields in order, unexpanded.
    mounts: tuple[Mapping[str, str], ...] = ()
    #: none, default or host.
    network: str = "default"
    security: str = "sandbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(Instruction):
    """COPY, or ADD."""

    #: As written; not those that are here-documents.
    sources: tuple[str, ...]
    #: What is copied from the Dockerfile itself; each a file of the heredoc's name.
    heredocs: tuple[Heredoc, ...]
    destination: str
    #: ADD unpacks archives and knows remote sources.
    is_add: bool
    #: A stage, its number, or an image; "" for the build context.
    source: str = ""
    chown: str = ""
    chmod: str = ""
    exclude: tuple[str, ...] = ()
    keeps_parents: bool = False
    #: None: as ADD does, that is, of local archives only.
    unpack: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workdir(Instruction):
    """The directory of what follows."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class User(Instruction):
    """Who runs what follows."""

    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cmd(Instruction):
    """What the image runs, or the entrypoint's arguments."""

    command: Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrypoint(Instruction):
    """What the image runs."""

    command: Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell(Instruction):
    """The shell of the shell forms that follow."""

    args: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expose(Instruction):
    """Ports, unexpanded."""

    ports: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume(Instruction):
    """Directories that hold data of containers."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSignal(Instruction):
    """What ends a container."""

    signal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthcheck(Instruction):
    """How a container is asked whether it is well; durations in nanoseconds, 0 for the runtime's own."""

    #: ``NONE``, or ``CMD`` or ``CMD-SHELL`` and what to run.
    test: tuple[str, ...]
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintainer(Instruction):
    """The author; what LABEL replaced."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OnBuild(Instruction):
    """A trigger for images built upon this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """FROM and what follows it."""

    start: From
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dockerfile:
    """A Dockerfile that is written as one must be."""

    #: For messages.
    file: str
    escape: str
    #: The ``syntax`` directive; "" for none.
    syntax: str
    #: What stands before the first FROM.
    global_args: tuple[Arg, ...]
    #: At least one.
    stages: tuple[Stage, ...]


def parse_dockerfile(data: str | bytes, file: str = "Dockerfile") -> Dockerfile:
    """Parse a Dockerfile.

    Args:
        data: It; UTF-8 where it is bytes.
        file: Its name, for messages.

    Raises:
        DockerfileError: it is not written as one must be; with the line.
    """
    if isinstance(data, bytes):
        try:
            data = data.decode()
        except UnicodeDecodeError as exc:
            line = exc.object.count(b"\n", 0, exc.start) + 1
            raise DockerfileError(file, line, "it is not UTF-8 text") from exc
    source = read_statements(data, file)
    instructions = [_Statement(statement, source).instruction() for statement in source.statements]
    starts = [index for index, instruction in enumerate(instructions) if isinstance(instruction, From)]
    head = instructions[: starts[0]] if starts else instructions
    global_args = tuple(arg for arg in head if isinstance(arg, Arg))
    if len(global_args) != len(head):
        stray = next(instruction for instruction in head if not isinstance(instruction, Arg))
        raise DockerfileError(file, stray.line, "only ARG may stand before the first FROM")
    if not starts:
        raise DockerfileError(file, instructions[-1].line, "there is no FROM")
    stages = tuple(_stage(instructions[at:end]) for at, end in zip(starts, [*starts[1:], None], strict=True))
    return Dockerfile(file=file, escape=source.escape, syntax=source.syntax, global_args=global_args, stages=stages)


def _stage(instructions: list[Instruction]) -> Stage:
    start, *rest = instructions
    assert isinstance(start, From)  # noqa: S101 - it is where the list was cut
    return Stage(start=start, instructions=tuple(rest))


class _Statement:
    """Reads one statement into an instruction."""

    def __init__(self, statement: Statement, source: Source) -> None:
        self._statement = statement
        self._source = source
        self._flags: dict[str, list[str]] = {}

    def instruction(self) -> Instruction:
        """Return the instruction.

        Raises:
            DockerfileError: it is not written as it must be.
        """
        statement = self._statement
        known = _READERS.get(statement.keyword)
        if known is None:
            self._fail(f"there is no instruction {statement.keyword}")
        allowed, read = known
        self._read_flags(allowed)
        if not statement.arguments:
            self._fail(f"{statement.keyword} needs an argument")
        try:
            return read(self)
        except RefusedError as exc:
            raise DockerfileError(self._source.file, statement.line, str(exc)) from exc

    # -- parts ----------------------------------------------------------------------------------------

    def _fail(self, what: str) -> NoReturn:
        raise DockerfileError(self._source.file, self._statement.line, what)

    @property
    def _arguments(self) -> str:
        return self._statement.arguments

    @property
    def _line(self) -> int:
        return self._statement.line

    @property
    def _text(self) -> str:
        statement = self._statement
        return " ".join([statement.keyword, *statement.flags, " ".join(statement.arguments.split())])

    def _read_flags(self, allowed: frozenset[str]) -> None:
        for flag in self._statement.flags:
            name, equals, value = flag.removeprefix("--").partition("=")
            if name not in allowed:
                self._fail(f"{self._statement.keyword} has no flag --{name}")
            if not equals and name not in _BOOLEAN_FLAGS:
                self._fail(f"--{name} needs a value")
            if name in self._flags and name not in _REPEATED_FLAGS:
                self._fail(f"--{name} is given twice")
            self._flags.setdefault(name, []).append(value if equals else "true")

    def _flag(self, name: str, default: str = "") -> str:
        return self._flags.get(name, [default])[0]

    def _boolean(self, name: str) -> bool | None:
        text = self._flag(name)
        if text and text.lower() not in _BOOLEANS:
            self._fail(f"--{name} is true or false, not {text!r}")
        return _BOOLEANS[text.lower()] if text else None

    def _json(self) -> tuple[str, ...] | None:
        try:
            return read_json_words(self._arguments)
        except ValueError as exc:
            raise DockerfileError(self._source.file, self._line, str(exc)) from exc

    def _list(self) -> tuple[str, ...]:
        """Return JSON's words, or those between blanks."""
        words = self._json()
        return tuple(self._arguments.split()) if words is None else words

    def _command(self) -> Command:
        words = self._json()
        if words is None:
            return Command(args=(self._arguments,), is_shell=True)
        return Command(args=words, is_shell=False)

    def _pairs(self) -> tuple[tuple[str, str], ...]:
        """Return ``name=value …``, or the one pair of the old ``name value``."""
        words = raw_words(self._arguments, self._source.escape)
        if "=" not in words[0]:
            name, *value = self._arguments.split(maxsplit=1)
            if not value:
                self._fail(f"{self._statement.keyword} {name} has no value: write {name}=VALUE")
            return ((name, value[0]),)
        pairs = [word.partition("=") for word in words]
        for name, equals, _ in pairs:
            if not equals:
                self._fail(f"{name!r} is not of the form NAME=VALUE")
            if not name:
                self._fail("a name before = is missing")
        return tuple((name, value) for name, _, value in pairs)

    def _nanoseconds(self, name: str) -> int:
        text = self._flag(name, "0s")
        if text == "0":
            return 0
        parts = _DURATION.findall(text)
        if not parts or "".join(parts) != text:
            self._fail(f"--{name} is a duration such as 1m30s, not {text!r}")
        total = 0.0
        for part in parts:
            unit = part.lstrip("0123456789.")
            total += float(part.removesuffix(unit)) * _NANOSECONDS[unit]
        if 0 < total < _LEAST_DURATION_NS:
            self._fail(f"--{name} is 1ms or more, not {text!r}")
        return round(total)

    # -- instructions ---------------------------------------------------------------------------------

    def from_(self) -> From:
        match self._arguments.split():
            case [base]:
                name = ""
            case [base, word, name] if word.upper() == "AS":
                name = name.lower()
                if not _STAGE_NAME.match(name):
                    self._fail(f"{name!r} is no name for a stage: letters, digits, '.', '_' and '-', a letter first")
            case _:
                self._fail("FROM is followed by an image, and perhaps AS and a name")
        return From(line=self._line, text=self._text, base=base, platform=self._flag("platform"), name=name)

    def arg(self) -> Arg:
        pairs = [word.partition("=") for word in raw_words(self._arguments, self._source.escape)]
        if any(not name for name, _, _ in pairs):
            self._fail("a name before = is missing")
        items = tuple((name, value if equals else None) for name, equals, value in pairs)
        return Arg(line=self._line, text=self._text, items=items)

    def env(self) -> Env:
        return Env(line=self._line, text=self._text, items=self._pairs())

    def label(self) -> Label:
        return Label(line=self._line, text=self._text, items=self._pairs())

    def run(self) -> Run:
        command = self._command()
        if not command.args:
            self._fail("RUN needs a command")
        network, security = self._flag("network", "default"), self._flag("security", "sandbox")
        if network not in ("none", "default", "host"):
            self._fail(f"--network is none, default or host, not {network!r}")
        if security not in ("sandbox", "insecure"):
            self._fail(f"--security is sandbox or insecure, not {security!r}")
        return Run(
            line=self._line,
            text=self._text,
            command=command,
            heredocs=self._statement.heredocs,
            mounts=tuple(self._mount(mount) for mount in self._flags.get("mount", [])),
            network=network,
            security=security,
        )

    def _mount(self, text: str) -> Mapping[str, str]:
        fields: dict[str, str] = {}
        for field in text.split(","):
            name, equals, value = field.partition("=")
            name = name.strip().lower()
            if not name or name in fields:
                self._fail(f"--mount={text} has a field {name!r}" + (" twice" if name else ""))
            fields[name] = value if equals else "true"
        return fields

    def copy(self) -> Copy:
        keyword = self._statement.keyword
        *words, destination = self._list() or ("",)
        is_json = self._json() is not None
        openers = [None if is_json else parse_opener(word) for word in words]
        sources = tuple(word for word, opener in zip(words, openers, strict=True) if opener is None)
        if not words:
            self._fail(f"{keyword} needs a source and a destination")
        if len(self._statement.heredocs) != len(words) - len(sources):
            self._fail(f"the heredocs of {keyword} must come before its destination, each as one word")
        if self._flag("from", "-") == "":
            self._fail("--from needs a value")
        return Copy(
            line=self._line,
            text=self._text,
            sources=sources,
            heredocs=self._statement.heredocs,
            destination=destination,
            is_add=keyword == "ADD",
            source=self._flag("from"),
            chown=self._flag("chown"),
            chmod=self._flag("chmod"),
            exclude=tuple(self._flags.get("exclude", [])),
            keeps_parents=bool(self._boolean("parents")),
            unpack=self._boolean("unpack"),
        )

    def workdir(self) -> Workdir:
        return Workdir(line=self._line, text=self._text, path=self._arguments)

    def user(self) -> User:
        return User(line=self._line, text=self._text, user=self._arguments)

    def cmd(self) -> Cmd:
        return Cmd(line=self._line, text=self._text, command=self._command())

    def entrypoint(self) -> Entrypoint:
        return Entrypoint(line=self._line, text=self._text, command=self._command())

    def shell(self) -> Shell:
        words = self._json()
        if not words:
            self._fail('SHELL needs a JSON array of words, such as ["/bin/sh", "-c"]')
        return Shell(line=self._line, text=self._text, args=words)

    def expose(self) -> Expose:
        return Expose(line=self._line, text=self._text, ports=tuple(self._arguments.split()))

    def volume(self) -> Volume:
        paths = self._list()
        if not paths or not all(paths):
            self._fail("VOLUME needs paths")
        return Volume(line=self._line, text=self._text, paths=paths)

    def stop_signal(self) -> StopSignal:
        return StopSignal(line=self._line, text=self._text, signal=self._arguments)

    def maintainer(self) -> Maintainer:
        return Maintainer(line=self._line, text=self._text, name=self._arguments)

    def on_build(self) -> OnBuild:
        return OnBuild(line=self._line, text=self._text)

    def healthcheck(self) -> Healthcheck:
        kind, *rest = self._arguments.split(maxsplit=1)
        if kind.upper() == "NONE":
            if rest:
                self._fail("HEALTHCHECK NONE takes no arguments")
            return Healthcheck(line=self._line, text=self._text, test=("NONE",))
        if kind.upper() != "CMD" or not rest:
            self._fail("HEALTHCHECK is followed by NONE, or by CMD and a command")
        try:
            words = read_json_words(rest[0])
        except ValueError as exc:
            raise DockerfileError(self._source.file, self._line, str(exc)) from exc
        retries = self._flag("retries", "0")
        if not retries.isdecimal():
            self._fail(f"--retries is a number, not {retries!r}")
        return Healthcheck(
            line=self._line,
            text=self._text,
            test=("CMD-SHELL", rest[0]) if words is None else ("CMD", *words),
            interval_ns=self._nanoseconds("interval"),
            timeout_ns=self._nanoseconds("timeout"),
            start_period_ns=self._nanoseconds("start-period"),
            start_interval_ns=self._nanoseconds("start-interval"),
            retries=int(retries),
        )


_BOOLEAN_FLAGS = frozenset({"link", "parents", "keep-git-dir", "unpack"})
_REPEATED_FLAGS = frozenset({"mount", "exclude"})
_NO_FLAGS: frozenset[str] = frozenset()
_COPY_FLAGS = frozenset({"chown", "chmod", "link", "exclude"})
_HEALTH_FLAGS = frozenset({"interval", "timeout", "start-period", "start-interval", "retries"})

#: Each instruction's flags, and what reads it. --link is a promise about caching that changes no result, and
#: --checksum and --keep-git-dir are about remote sources, which are refused.
_READERS: dict[str, tuple[frozenset[str], Callable[[_Statement], Instruction]]] = {
    "ADD": (_COPY_FLAGS | {"checksum", "keep-git-dir", "unpack"}, _Statement.copy),
    "ARG": (_NO_FLAGS, _Statement.arg),
    "CMD": (_NO_FLAGS, _Statement.cmd),
    "COPY": (_COPY_FLAGS | {"from", "parents"}, _Statement.copy),
    "ENTRYPOINT": (_NO_FLAGS, _Statement.entrypoint),
    "ENV": (_NO_FLAGS, _Statement.env),
    "EXPOSE": (_NO_FLAGS, _Statement.expose),
    "FROM": (frozenset({"platform"}), _Statement.from_),
    "HEALTHCHECK": (_HEALTH_FLAGS, _Statement.healthcheck),
    "LABEL": (_NO_FLAGS, _Statement.label),
    "MAINTAINER": (_NO_FLAGS, _Statement.maintainer),
    "ONBUILD": (_NO_FLAGS, _Statement.on_build),
    "RUN": (frozenset({"mount", "network", "security"}), _Statement.run),
    "SHELL": (_NO_FLAGS, _Statement.shell),
    "STOPSIGNAL": (_NO_FLAGS, _Statement.stop_signal),
    "USER": (_NO_FLAGS, _Statement.user),
    "VOLUME": (_NO_FLAGS, _Statement.volume),
    "WORKDIR": (_NO_FLAGS, _Statement.workdir),
}
