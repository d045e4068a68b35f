"""``lazyfarm build``: a Dockerfile becomes an image, on the cluster."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cache_options import CacheSource, CacheTarget, parse_cache_source, parse_cache_target
from cluster.errors import InvalidArgumentError, MissingSecretError
from cluster.graph import Definition, RunOp
from cluster.reference import parse_platform, parse_reference
from lazyfarm import graph
from lazyfarm.cli import build_args, parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, short, size
from lazyfarm.cli.job_progress import check_mode, showing
from lazyfarm.cli.layers import watching
from lazyfarm.cli.options import JsonOption, ProgressOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output as Printed
from lazyfarm.dockerfile.convert import EPOCH_ARG, BuildOptions
from lazyfarm.dockerfile.frontend import (
    STDIN,
    BuildSource,
    build_options,
    check_source,
    convert_source,
    read_source,
)
from lazyfarm.outputs import STDOUT, Output

if TYPE_CHECKING:
    from cluster.job import JobEvent
    from cluster.messages import PushResult
    from lazyfarm.cli import documents
    from lazyfarm.farm import Farm
    from lazyfarm.job import Job
    from lazyfarm.ref import Ref

app = command_app()

#: What `--network` may be, and what commands see then.
_NETWORKS = {"default": "host", "host": "host", "none": "none"}


@app.command(
    epilog=example(
        "lazyfarm build -t registry.internal/app:1 --push .",
        "lazyfarm build -f docker/Dockerfile --target test --build-arg VERSION=1.2 .",
        "lazyfarm build --secret id=token,env=TOKEN -o type=oci,dest=app.tar .",
    )
)
def build(
    *,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What COPY and ADD copy from.", show_default=False)],
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE", help="Default: DIR/Dockerfile; -: stdin.", show_default=False),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", metavar="STAGE", help="Default: the last stage.", show_default=False)
    ] = "",
    build_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--build-arg",
            metavar="NAME[=VALUE]",
            help="A build argument; NAME alone: from the environment. May be repeated.",
            show_default=False,
        ),
    ] = None,
    build_context: Annotated[
        list[str] | None,
        typer.Option(
            "--build-context",
            metavar="NAME=DIR|docker-image://IMAGE",
            help="What FROM and --from find under a name, instead of a stage or image. May be repeated.",
            show_default=False,
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            "--secret",
            metavar="id=ID[,src=FILE|,env=NAME]",
            help="For RUN --mount=type=secret; it stays in this process. May be repeated.",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            "--tag", "-t", metavar="NAME", help="What the image is called. May be repeated.", show_default=False
        ),
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Push the image under each of its names.")] = False,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="oci:DIR, oci-archive:FILE, local:DIR, DIR, or type=local|oci|image|registry,… May be repeated.",
            show_default=False,
        ),
    ] = None,
    cache_from: Annotated[
        list[str] | None,
        typer.Option(
            "--cache-from", metavar="CACHE", help="type=registry,ref=NAME. May be repeated.", show_default=False
        ),
    ] = None,
    cache_to: Annotated[
        list[str] | None,
        typer.Option(
            "--cache-to",
            metavar="CACHE",
            help="type=registry,ref=NAME[,mode=min|max], or type=inline. May be repeated.",
            show_default=False,
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Run every step afresh.")] = False,
    platform: Annotated[
        str,
        typer.Option("--platform", metavar="OS/ARCH[/VARIANT]", help="Default: this machine's.", show_default=False),
    ] = "",
    plain_http: Annotated[
        list[str] | None,
        typer.Option(
            "--plain-http",
            metavar="HOST[:PORT]",
            help="A registry to talk to over plain HTTP, for this call. May be repeated.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str, typer.Option("--network", metavar="MODE", help="What RUN sees of the network: default, host or none.")
    ] = "default",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="NAME=VALUE", help="Of the image, and of the job. May be repeated.", show_default=False
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit the build, print its job's ID, and leave.")] = False,
    progress: ProgressOption = "auto",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build an image from a Dockerfile. Each step runs once for the cluster, and not at all where it is cached.

    What can't be meant or is not supported is said with file and line before anything runs. Layers stay where they
    are until a step needs them: `--push` to the base's registry moves only what is new.
    """
    check_mode(progress, as_json=as_json)
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        environ = os.environ
        args = build_args.build_args(build_arg or (), environ)
        if EPOCH_ARG in environ:
            args.setdefault(EPOCH_ARG, environ[EPOCH_ARG])
        image_labels = build_args.labels(label or ())
        plan = _Plan(
            source=read_source(_checked(directory), file, read_stdin=sys.stdin.buffer.read),
            options=build_options(
                target=target,
                args=args,
                platform=_one_platform(platform),
                network=_network(network),
                plain_http=plain_http or (),
                labels=image_labels,
                contexts=build_args.build_contexts(build_context or ()),
            ),
            secrets=build_args.secrets(secret or (), environ),
            outputs=build_args.outputs(output or (), tag or (), push=push),
            cache_from=_cache_sources(cache_from or (), plain_http or ()),
            cache_to=_cache_targets(cache_to or (), plain_http or ()),
            no_cache=no_cache,
            detached=detach,
            labels=_job_labels(directory, file, target) | image_labels,
        )
        plan.check()
        checked = asyncio.run(check_source(plan.source, plan.options))
        # What was asked for as documents, or as an archive, is alone on stdout.
        has_archive = any(export.dest == STDOUT for export in plan.outputs.exports)
        if has_archive and (as_json or progress == "json" or out.stdout.isatty()):
            reason = "--json and --progress=json go there too, and a terminal can't show it: name a file"
            raise InvalidArgumentError("--output", "written to standard output", reason)
        words = _on_stderr(out) if progress == "json" or has_archive else out
        shown = words if has_archive else out
        if checked is not None and checked.unused_args and not as_json:
            unused = ", ".join(checked.unused_args)
            out.stderr.write(f"warning: build arguments that no ARG asks for: {unused}\n")
        settings = parts.driving_settings(state_dir)

        async def act(farm: Farm) -> Built:
            return await carry_out(farm, plan, shown, words, progress)

        built = parts.acting(settings, out, "build", act)
        out.document(document(built))
        show(built, words)


def _checked(directory: str) -> str:
    if directory == STDIN or "://" in directory:
        raise InvalidArgumentError("DIR", repr(directory), "name a directory of this machine")
    return directory


def _one_platform(text: str) -> str:
    if "," in text:
        raise InvalidArgumentError("--platform", text, "one build is for one platform: build for each by itself")
    if text:
        parse_platform(text)
    return text


def _network(text: str) -> str:
    if text not in _NETWORKS:
        raise InvalidArgumentError("--network", repr(text), f"it is one of {', '.join(_NETWORKS)}")
    return _NETWORKS[text]


def _cache_sources(texts: Sequence[str], plain_http: Collection[str]) -> tuple[CacheSource, ...]:
    sources = [parse_cache_source(text) for text in texts]
    return tuple(replace(one, plain_http=_is_plain(one.ref, plain_http)) for one in sources)


def _cache_targets(texts: Sequence[str], plain_http: Collection[str]) -> tuple[CacheTarget, ...]:
    targets = [parse_cache_target(text) for text in texts]
    return tuple(replace(one, plain_http=_is_plain(one.ref, plain_http)) for one in targets)


def _is_plain(ref: str, plain_http: Collection[str]) -> bool:
    return bool(ref) and parse_reference(ref).host in plain_http


def _job_labels(directory: str, file: str | None, target: str) -> dict[str, str]:
    named = {"directory": str(Path(directory).absolute()), "file": file or "", "target": target}
    return {name: text for name, text in named.items() if text}


def _on_stderr(out: Printed) -> Printed:
    words = Printed(as_json=False)
    words.stdout, words.stderr = out.stderr, out.stderr
    return words


# -- what is asked for ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A build, with all that could be checked of it."""

    source: BuildSource
    options: BuildOptions
    #: Values never show.
    secrets: Mapping[str, bytes | Path] = field(repr=False)
    outputs: build_args.Outputs
    cache_from: tuple[CacheSource, ...]
    cache_to: tuple[CacheTarget, ...]
    no_cache: bool
    detached: bool
    labels: dict[str, str]

    def check(self) -> None:
        """Refuse what a build can't do when nobody waits for it.

        Raises:
            InvalidArgumentError: with what is given to a detached build.
        """
        if not self.detached:
            return
        for name, given, why in (
            ("--tag, --push and --output", self.outputs != _NOWHERE, "what is built is named and moved by who waits"),
            ("--secret", bool(self.secrets), "nobody is there to give it"),
        ):
            if given:
                raise InvalidArgumentError(name, "given with --detach", f"{why}: leave --detach out")


_NOWHERE = build_args.Outputs(exports=(), tags=(), pushes=())


# -- what is done -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What came of a build."""

    job: str
    #: None: nobody waited for it.
    ref: Ref | None = None
    #: Under each name.
    images: Mapping[str, Ref] = field(default_factory=dict)
    pushes: Mapping[str, PushResult] = field(default_factory=dict)
    exports: tuple[Output, ...] = ()


async def carry_out(farm: Farm, plan: _Plan, out: Printed, words: Printed, progress: str) -> Built:
    """Build, name, push and write what *plan* asks for.

    Raises:
        MissingSecretError: a command needs a secret that is not given; nothing has run.
        ClusterError: what failed.
    """
    converted = await convert_source(farm, plan.source, plan.options)
    resolved = await asyncio.to_thread(graph.resolve, [converted.state])
    _check_secrets(resolved.definition, plan.secrets)

    def solve(watch: Callable[[JobEvent], None] | None) -> Job:
        return farm.solve(
            resolved,
            config=converted.config,
            no_cache=plan.no_cache,
            secrets=plan.secrets,
            labels=plan.labels,
            cache_from=plan.cache_from,
            cache_to=plan.cache_to,
            detached=plan.detached,
            on_event=watch,
        )

    if plan.detached:
        job = solve(None)
        await job.submitted()
        return Built(job=job.id)
    with showing(out, progress) as watch:
        job = solve(watch)
        result = await job
    outputs, epoch_s = plan.outputs, plan.options.epoch_s
    images = {one.name: await farm.tag(result, one.name, created_s=epoch_s) for one in outputs.tags}
    pushes: dict[str, PushResult] = {}
    for one in outputs.pushes:
        is_plain = bool({one.host, one.registry} & plan.options.plain_http)
        with watching(words) as look:
            pushes[one.name] = await farm.push(images[one.name], one.name, plain_http=is_plain, progress=look)
    for output in outputs.exports:
        with watching(words) as look:
            await farm.export(result, output, names=list(images), progress=look)
    return Built(job=job.id, ref=result.ref, images=images, pushes=pushes, exports=outputs.exports)


def _check_secrets(definition: Definition, given: Mapping[str, object]) -> None:
    for digest in definition.order:
        op = definition.vertices[digest].op
        for mount in op.secrets if isinstance(op, RunOp) else ():
            if mount.is_required and mount.id not in given:
                raise MissingSecretError(mount.id)


# -- what is told -----------------------------------------------------------------------------------------


def document(built: Built) -> documents.Build | documents.DetachedBuild:
    """Return the JSON document of a build."""
    if built.ref is None:
        return {"job": built.job, "detached": True}
    return {
        "job": built.job,
        "ref": built.ref.id,
        "layers": [
            {"digest": layer.record.blob.digest, "size": layer.record.blob.size_bytes, "lazy": layer.is_lazy}
            for layer in built.ref.layers
        ],
        "images": [
            {"name": name, "digest": image.digest, "pushed": _pushed(built.pushes.get(name))}
            for name, image in built.images.items()
        ],
        "outputs": [str(output) for output in built.exports],
    }


def _pushed(push: PushResult | None) -> list[documents.PushedLayer] | None:
    if push is None:
        return None
    return [{"digest": layer.digest, "how": layer.how, "bytes": layer.bytes} for layer in push.layers]


def show(built: Built, words: Printed) -> None:
    """Print what came of a build, for people."""
    if built.ref is None:
        words.line(f"job {built.job}: `lazyfarm attach {built.job}` follows it")
        return
    for name, image in built.images.items():
        words.line(f"{name}  {image.digest}")
    for name, push in built.pushes.items():
        sent = [layer for layer in push.layers if layer.bytes]
        moved = f"{count(len(sent), 'layer')}, {size(sum(layer.bytes for layer in sent))}" if sent else "no layer"
        words.line(f"pushed {name}: {moved} uploaded")
    for output in built.exports:
        if output.dest != STDOUT:
            words.line(f"wrote {output}")
    total_bytes = sum(layer.record.blob.size_bytes for layer in built.ref.layers)
    lazy = sum(layer.is_lazy for layer in built.ref.layers)
    words.line(f"ref {short(built.ref.id)}: {count(len(built.ref.layers), 'layer')}, {lazy} lazy, {size(total_bytes)}")
