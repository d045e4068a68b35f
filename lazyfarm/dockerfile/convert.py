"""Dockerfiles as build graphs: the stages that a target needs, and the image config that they make.

Nothing runs and no image is pulled: only the configs of bases are asked for, by a function that is given. What a
Dockerfile means is what BuildKit's frontend makes of it (``frontend/dockerfile/dockerfile2llb``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NoReturn

from cluster.errors import DockerfileError, InputError, InvalidArgumentError
from cluster.graph import CopyAction, FileOp, Network
from cluster.patterns import PatternMatcher
from cluster.reference import ImageReference, Platform
from lazyfarm import graph
from lazyfarm.dockerfile.config import StageConfig
from lazyfarm.dockerfile.expand import expand, expand_body, expand_words
from lazyfarm.dockerfile.instructions import (
    Arg,
    Cmd,
    Command,
    Copy,
    Dockerfile,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    OnBuild,
    Run,
    Shell,
    StopSignal,
    User,
    Volume,
    Workdir,
)
from lazyfarm.dockerfile.mounts import MountPlace, read_mount
from lazyfarm.dockerfile.parser import Heredoc, parse_opener
from lazyfarm.dockerfile.refused import RefusedError
from lazyfarm.dockerfile.stages import LocalSource, NamedContext, StageSource, StageTable, platform_args

#: Arguments that commands get without an ARG, where they are given, in small letters and in capitals: programs look
#: for either. They are in no cache key then.
_PROXIES = frozenset({"http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"})
#: The time that a build is to be of (reproducible-builds.org): commands get it without an ARG, and the image has it.
EPOCH_ARG = "SOURCE_DATE_EPOCH"
#: The last second of the year 9999.
_MAX_EPOCH_S = 253_402_300_799
#: Frontends whose language this is.
_SYNTAX = re.compile(r"(?:docker\.io/)?docker/dockerfile(?:-upstream)?(?:[:@].*)?\Z")
_REMOTE = re.compile(r"(?:[a-z][a-z0-9+.-]*://|[\w.-]+@[\w.-]+:)", re.IGNORECASE)
_PORT = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?(?:/(?P<protocol>tcp|udp|sctp))?\Z", re.IGNORECASE)
_SIGNAL = re.compile(r"\d+|(?:SIG)?[A-Z][A-Z0-9]*(?:[+-]\d+)?", re.IGNORECASE)
_OCTAL = re.compile(r"[0-7]{1,5}\Z")
_WILDCARDS = frozenset("*?[")
_MAX_PORT = 65535
#: Where heredocs that name their own interpreter are mounted, as in BuildKit.
_SCRIPTS = "/dev/pipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What was found of an image that a stage is built upon."""

    #: Best with its digest, so that the layers are those of this config whatever becomes of the tag.
    reference: ImageReference
    #: Its image config, for the platform that was asked for.
    config: bytes


#: Finds the base that a reference names, for a platform. May raise any error of the farm.
ResolveBase = Callable[[ImageReference, Platform], Awaitable[Base]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a build is asked for."""

    #: What the image is for.
    platform: Platform
    #: What commands run on; BUILDPLATFORM.
    build_platform: Platform
    #: A stage's name or number; "" for the last one.
    target: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    #: What commands see of the network where they don't say.
    network: Network = Network.HOST
    #: Registries that are spoken to without TLS.
    plain_http: frozenset[str] = frozenset()
    #: Labels of the image, over those that the Dockerfile gives it.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: By :func:`lazyfarm.dockerfile.stages.context_key`: what takes the place of stages and images of these names.
    contexts: Mapping[str, NamedContext] = field(default_factory=dict)

    @property
    def epoch_s(self) -> int | None:
        """Return the time that the build is to be of, in seconds since 1970; None: nobody says.

        Raises:
            InvalidArgumentError: it is none.
        """
        text = self.args.get(EPOCH_ARG, "")
        if not text:
            return None
        if not (text.isascii() and text.isdecimal() and int(text) <= _MAX_EPOCH_S):
            raise InvalidArgumentError(EPOCH_ARG, repr(text), "it is a whole number of seconds since 1970")
        return int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A Dockerfile's target as a build graph."""

    state: graph.State
    #: The image config (JSON), without a rootfs and times: those are known when layers are. But for when it was made,
    #: where the build says.
    config: bytes
    #: Build arguments that no ARG asks for.
    unused_args: tuple[str, ...] = ()


async def convert(
    dockerfile: Dockerfile, context: graph.State, options: BuildOptions, resolve: ResolveBase
) -> Converted:
    """Return the graph that builds a Dockerfile's target.

    Only stages that the target needs are looked at, and only their bases asked for.

    Args:
        dockerfile: From :func:`lazyfarm.dockerfile.instructions.parse_dockerfile`.
        context: What COPY and ADD copy from; it is in the graph only if something does.
        options: What is asked for.
        resolve: Finds bases; asked once for each reference and platform.

    Raises:
        DockerfileError: something can't be meant or is not supported; with the line.
        InvalidArgumentError: ``SOURCE_DATE_EPOCH`` is no time.
        MalformedManifestError: a base's config is none.
        ClusterError: what *resolve* raises.
    """
    if dockerfile.syntax and not _SYNTAX.match(dockerfile.syntax):
        raise DockerfileError(dockerfile.file, 1, f"the frontend {dockerfile.syntax} is not supported")
    epoch_s = options.epoch_s
    platforms = platform_args(options.platform, options.build_platform)
    table = StageTable(dockerfile, options.args, platforms, options.contexts)
    target = table.target(options.target)
    order = table.needed(target)
    bases: dict[tuple[str, Platform], Base] = {}
    stages: dict[int, _Stage] = {}
    for index in order:
        start = dockerfile.stages[index].start
        platform = table.platform(index, options.platform)
        replaced = table.replaced(index)
        found = table.base(index) if replaced is None else replaced
        build = _Build(dockerfile=dockerfile, table=table, options=options, context=context, stages=stages)
        if found is None:
            stage = _Stage(build, start, platform, graph.scratch(), StageConfig.scratch(platform))
        elif isinstance(found, StageSource):
            stage = stages[found.index].child(start)
        elif isinstance(found, LocalSource):
            stage = _Stage(build, start, platform, found.state, StageConfig.scratch(platform))
        else:
            key = found.reference.name, platform
            if key not in bases:
                bases[key] = await resolve(found.reference, platform)
            stage = _Stage.upon(build, start, platform, bases[key])
        for instruction in dockerfile.stages[index].instructions if replaced is None else ():
            stage.add(instruction)
        stages[index] = stage
    config = stages[target].config
    for name, value in options.labels.items():
        config.set_label(name, value)
    if epoch_s is not None:
        config.set_created(epoch_s)
    unused = options.args.keys() - _declared(dockerfile) - table.globals.keys() - {EPOCH_ARG}
    return Converted(
        state=stages[target].state,
        config=config.to_json(),
        unused_args=tuple(sorted(name for name in unused if name.lower() not in _PROXIES)),
    )


def _declared(dockerfile: Dockerfile) -> set[str]:
    args = [*dockerfile.global_args]
    for stage in dockerfile.stages:
        args += [instruction for instruction in stage.instructions if isinstance(instruction, Arg)]
    return {name for arg in args for name, _ in arg.items}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """What the stages of one conversion share."""

    dockerfile: Dockerfile
    table: StageTable
    options: BuildOptions
    context: graph.State
    #: Those that are done.
    stages: Mapping[int, _Stage]

    def image(self, reference: ImageReference, platform: Platform) -> graph.State:
        is_plain = reference.registry in self.options.plain_http
        return graph.image(reference.name, platform=str(platform), plain_http=is_plain)


class _Stage:
    """A stage while its instructions are added one by one."""

    def __init__(self, build: _Build, start: From, platform: Platform, state: graph.State, config: StageConfig) -> None:
        self._build = build
        self._start = start
        self._platform = platform
        self.state = state
        self.config = config
        #: What expansions and commands see: the image's environment and the arguments.
        self._env = config.env
        self._has_cmd = False

    @classmethod
    def upon(cls, build: _Build, start: From, platform: Platform, base: Base) -> _Stage:
        """Return a stage that begins with an image."""
        config = StageConfig.of_base(base.config, base.reference.name)
        if config.triggers:
            what = f"{base.reference.name} has ONBUILD triggers ({config.triggers[0]} …), which are not supported"
            raise DockerfileError(build.dockerfile.file, start.line, what)
        return cls(build, start, platform, build.image(base.reference, platform), config)

    def child(self, start: From) -> _Stage:
        """Return a stage that begins where this one ends, with its arguments."""
        stage = _Stage(self._build, start, self._platform, self.state, self.config.copy())
        stage._env = dict(self._env)
        return stage

    def add(self, instruction: Instruction) -> None:  # noqa: C901, PLR0912 - one case for each instruction
        """Do what an instruction says.

        Raises:
            DockerfileError: it can't be meant, or is not supported.
        """
        with self._at(instruction):
            match instruction:
                case Run():
                    self._run(instruction)
                case Copy():
                    self._copy(instruction)
                case Workdir():
                    self._change_directory(instruction)
                case Arg():
                    self._declare(instruction)
                case Env():
                    # All of one instruction see what was before it.
                    pairs = [(self._expand(name), self._expand(value)) for name, value in instruction.items]
                    for name, value in pairs:
                        if not name:
                            self._fail("the name of a variable is empty")
                        self._env[name] = value
                        self.config.set_env(name, value)
                case Label():
                    for name, value in instruction.items:
                        self.config.set_label(self._expand(name), self._expand(value))
                case User():
                    self.config.run["User"] = self._expand(instruction.user)
                case Cmd():
                    self._has_cmd = True
                    self.config.run["Cmd"] = self._command(instruction.command)
                case Entrypoint():
                    self.config.run["Entrypoint"] = self._command(instruction.command)
                    if not self._has_cmd:
                        # The base's are arguments of another entrypoint.
                        self.config.run.pop("Cmd", None)
                case Shell():
                    self.config.run["Shell"] = list(instruction.args)
                case Expose():
                    self._expose(instruction)
                case Volume():
                    self.config.add_keys("Volumes", [self._expand(path) for path in instruction.paths])
                case StopSignal():
                    self._set_stop_signal(instruction)
                case Healthcheck():
                    self._set_healthcheck(instruction)
                case Maintainer():
                    self.config.set_author(instruction.name)
                case OnBuild():
                    self._fail("ONBUILD is not supported")
                case _:
                    self._fail("the instruction is not supported")
        if not isinstance(instruction, Run | Copy | Workdir):
            self.config.add_history(instruction.text, has_layer=False)

    # -- what can go wrong ----------------------------------------------------------------------------

    @contextmanager
    def _at(self, instruction: Instruction) -> Iterator[None]:
        """Say where an error comes from."""
        try:
            yield
        except DockerfileError:
            raise
        except (RefusedError, InputError) as exc:
            raise DockerfileError(self._build.dockerfile.file, instruction.line, str(exc)) from exc

    def _fail(self, what: str) -> NoReturn:
        raise RefusedError(what)

    # -- words ----------------------------------------------------------------------------------------

    def _expand(self, text: str) -> str:
        return expand(text, self._env, self._build.dockerfile.escape)

    def _command(self, command: Command) -> list[str]:
        return [*self.config.shell, *command.args] if command.is_shell else list(command.args)

    def _source(self, text: str, line: int) -> graph.State:
        """Return the filesystem that a ``--from`` names; the build context for ""."""
        if not text:
            return self._build.context
        found = self._build.table.source(text, line)
        if isinstance(found, StageSource):
            return self._build.stages[found.index].state
        if isinstance(found, LocalSource):
            return found.state
        return self._build.image(found.reference, self._build.options.platform)

    def _step(self, state: graph.State, instruction: Instruction) -> None:
        name = f"[{self._start.name}] " if self._start.name else ""
        self.state = state.named(name + instruction.text)
        self.config.add_history(instruction.text, has_layer=True)

    # -- instructions ---------------------------------------------------------------------------------

    def _declare(self, arg: Arg) -> None:
        for name, default in arg.items:
            given = self._build.options.args.get(name)
            if given is not None:
                self._env[name] = given
            elif default is not None:
                self._env[name] = self._expand(default)
            elif name in self._build.table.globals:
                self._env[name] = self._build.table.globals[name]

    def _change_directory(self, workdir: Workdir) -> None:
        path = self._absolute(self._expand(workdir.path))
        self.config.run["WorkingDir"] = path
        if path == "/":
            self.config.add_history(workdir.text, has_layer=False)
        else:
            self._step(self.state.mkdir(path, owner=self.config.user), workdir)

    def _absolute(self, path: str) -> str:
        return "/" + posixpath.normpath(posixpath.join(self.config.directory, path)).lstrip("/")

    def _run(self, run: Run) -> None:
        if run.security == "insecure":
            self._fail("--security=insecure is not supported")
        place = MountPlace(
            directory=self.config.directory, expand=self._expand, source=lambda name: self._source(name, run.line)
        )
        mounts = [read_mount(fields, place) for fields in run.mounts]
        args = self._command(run.command)
        if run.heredocs:
            args = self._with_heredocs(run, mounts)
        given = self._build.options.args
        epoch = {EPOCH_ARG: given[EPOCH_ARG]} if given.get(EPOCH_ARG) else {}
        proxies = {name: value for name, value in given.items() if name.lower() in _PROXIES}
        both = {spelled: value for name, value in proxies.items() for spelled in (name.lower(), name.upper())}
        networks = {"default": self._build.options.network, "none": Network.NONE, "host": Network.HOST}
        state = self.state.run(
            args,
            env=epoch | self._env,
            proxy_env=both | proxies,
            cwd=self.config.directory,
            user=self.config.user,
            mounts=mounts,
            network=networks[run.network],
        )
        self._step(state, run)

    def _with_heredocs(self, run: Run, mounts: list[graph.Mount]) -> list[str]:
        """Return the words of a command that has heredocs; one that brings its own interpreter is mounted."""
        (written,) = run.command.args
        first = run.heredocs[0]
        if len(run.heredocs) > 1 or parse_opener(written) is None:
            # The shell knows heredocs itself.
            bodies = [f"\n{heredoc.content}{heredoc.name}" for heredoc in run.heredocs]
            return [*self.config.shell, written + "".join(bodies)]
        if not first.data.startswith("#!"):
            return [*self.config.shell, first.data]
        script = graph.scratch().mkfile(first.name, first.data, mode=0o755)
        mounts.append(graph.bind(script, _SCRIPTS))
        return [posixpath.join(_SCRIPTS, first.name)]

    def _copy(self, copy: Copy) -> None:
        written = self._expand(copy.destination)
        destination = self._absolute(written)
        is_directory = written.endswith(("/", "/.")) or written in ("", ".")
        if is_directory and destination != "/":
            destination += "/"
        if len(copy.sources) + len(copy.heredocs) > 1 and not destination.endswith("/"):
            self._fail(f"several sources need a destination that ends in a slash, not {copy.destination}")
        exclude = tuple(self._expand(pattern) for pattern in copy.exclude)
        PatternMatcher(exclude)  # raises where one is malformed
        template = CopyAction(
            input=1,
            sources=(),
            destination=destination,
            # Docker's rule: what comes from the build context is root's, what comes from a stage keeps its owner.
            owner=self._expand(copy.chown) or ("" if copy.source else "0:0"),
            mode=self._mode(self._expand(copy.chmod)) if copy.chmod else None,
            follow_symlinks=True,
            exclude=exclude,
        )
        paths = [self._expand(path) for path in copy.sources]
        inputs = [self._source(copy.source, copy.line)] if paths else []
        actions = [self._copy_action(copy, template, path) for path in paths]
        if copy.heredocs:
            inputs.append(self._files(copy.heredocs))
            sources = tuple(f"/{heredoc.name}" for heredoc in copy.heredocs)
            actions.append(replace(template, input=len(inputs), sources=sources, wildcards=False))
        self._step(graph.State(FileOp(actions=tuple(actions)), (self.state, *inputs)), copy)

    def _copy_action(self, copy: Copy, template: CopyAction, path: str) -> CopyAction:
        if not path:
            self._fail("a source is empty")
        if _REMOTE.match(path):
            self._fail(f"{path}: sources at a URL are not supported; fetch it with RUN, or put it into the directory")
        action = replace(
            template,
            sources=(_rooted(path),),
            # That nothing matches is no error, that a file isn't there is one.
            allow_missing=bool(_WILDCARDS.intersection(path)),
            unpack=copy.is_add and copy.unpack is not False,
        )
        if not copy.keeps_parents:
            return action
        # What stands before "/./" is not kept.
        kept = posixpath.dirname(_rooted(path.rpartition("/./")[2]).rstrip("/"))
        if _WILDCARDS.intersection(posixpath.dirname(_rooted(path))):
            self._fail(f"{path}: with --parents, wildcards in directories are not supported")
        destination = posixpath.join(template.destination, kept.lstrip("/"))
        return replace(action, destination=destination.rstrip("/") + "/", contents_only=False)

    def _files(self, heredocs: tuple[Heredoc, ...]) -> graph.State:
        """Return a filesystem with the heredocs as files."""
        state = graph.scratch()
        for heredoc in heredocs:
            data = expand_body(heredoc.data, self._env) if heredoc.is_expanded else heredoc.data
            state = state.mkfile(heredoc.name, data)
        return state

    def _mode(self, text: str) -> int:
        if not _OCTAL.match(text):
            self._fail(f"--chmod={text} is not supported: write the mode as octal digits, such as 0755")
        return int(text, 8)

    def _expose(self, expose: Expose) -> None:
        ports = []
        for word in (word for port in expose.ports for word in expand_words(port, self._env)):
            found = _PORT.match(word)
            first = int(found["first"]) if found else 0
            last = int(found["last"] or first) if found else 0
            if found is None or not 0 < first <= last <= _MAX_PORT:
                self._fail(f"{word} is no port: write PORT[-PORT][/tcp|udp|sctp]")
            protocol = (found["protocol"] or "tcp").lower()
            ports += [f"{port}/{protocol}" for port in range(first, last + 1)]
        self.config.add_keys("ExposedPorts", ports)

    def _set_stop_signal(self, stop: StopSignal) -> None:
        signal = self._expand(stop.signal)
        if not _SIGNAL.fullmatch(signal):
            self._fail(f"{signal!r} is no signal")
        self.config.run["StopSignal"] = signal

    def _set_healthcheck(self, check: Healthcheck) -> None:
        numbers = {
            "Interval": check.interval_ns,
            "Timeout": check.timeout_ns,
            "StartPeriod": check.start_period_ns,
            "StartInterval": check.start_interval_ns,
            "Retries": check.retries,
        }
        given = {name: number for name, number in numbers.items() if number}
        self.config.run["Healthcheck"] = {"Test": list(check.test), **given}


def _rooted(path: str) -> str:
    """Return a source's path from the root; one that would climb above it ends there."""
    return "/" + posixpath.normpath("/" + path).lstrip("/")
