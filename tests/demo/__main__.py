"""``make demo``: shows what lazyfarm promises on real parts, and checks every number.

    python -m tests.demo                    images built from Debian packages
    python -m tests.demo --image debian:12  an image of yours; what is built begins with the demo's own

Exit status: 0 all numbers are as wanted, 1 one is not, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tests.demo import steps
from tests.demo.build_steps import BuildSteps, can_build
from tests.demo.farm_process import CommandFailedError, DriverFailedError
from tests.demo.signals import INTERRUPTED, end_as_interrupted
from tests.demo.stage import Stage
from tests.demo.table import Row, show, that
from tests.doubles.image import Bases, cached_bases, cached_image
from tests.doubles.oci_layout import ImageToolError, LayoutImage, fetch

_NAME = "demo/app:1"


def main() -> int:
    """Run every step and print one table."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="Show what lazyfarm promises.")
    parser.add_argument("--image", metavar="REFERENCE", help="an image of yours instead of the one built here")
    options = parser.parse_args()
    end_as_interrupted()
    console = Console(soft_wrap=not sys.stdout.isatty())
    began = time.monotonic()

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - began:5.0f} s] {what}", highlight=False, markup=False)

    try:
        sections = _demo(options.image, say)
    except KeyboardInterrupt:
        say("interrupted; everything was taken down")
        return INTERRUPTED
    except (CommandFailedError, DriverFailedError, ImageToolError) as error:
        say(f"error: {error}")
        return 1
    everything_ok = show(sections, console)
    say("every number is as wanted" if everything_ok else "A NUMBER IS WRONG")
    return 0 if everything_ok else 1


def _demo(reference: str | None, say: Callable[[str], None]) -> list[tuple[str, list[Row]]]:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfarm-image-", dir="/var/tmp"))
        # The images are made while the farm comes up: a minute each, the first time.
        making = stack.enter_context(ThreadPoolExecutor(1)).submit(_images, reference, directory, say)
        stage = stack.enter_context(Stage(say, steps.CONFIG))
        image, bases = making.result()
        say(f"image: {len(image.layers)} layers, {image.size_bytes / 1e6:.1f} MB")
        stage.push(image, _NAME)
        app = stage.reference(_NAME)
        planned: list[tuple[str, Callable[[], list[Row]]]] = [
            ("a lazy pull", lambda: steps.lazy_pull(stage, image, app)),
            (
                "a retag, and a push to another repository",
                lambda: steps.retag_and_push(stage, image, app, stage.reference("demo/elsewhere:1")),
            ),
            (
                f"{steps.CALLERS} extracts at once on three nodes, empty content store, thin link",
                lambda: steps.eight_extracts(stage, image, app),
            ),
            ("a program from the extracted root", lambda: steps.program_from_root(stage, app)),
            ("a pull and an unlazy by one driver, token server", lambda: steps.one_of_each_request(stage, image)),
            ("the owner of a flight is killed -9", lambda: steps.owner_killed(stage, image)),
        ]
        if reference is not None:
            planned.insert(0, ("a lazy pull from its own registry", lambda: steps.pull_as_named(stage, reference)))
        planned += _planned_builds(stage, bases)
        sections = []
        for title, step in planned:
            say(title)
            try:
                sections.append((title, step()))
            except (CommandFailedError, DriverFailedError) as error:
                # The rest is shown all the same.
                say(f"error: {error}")
                sections.append((title, [that("the step", ok=False, value=str(error), wanted="no error")]))
        return sections


def _planned_builds(stage: Stage, bases: Bases | None) -> list[tuple[str, Callable[[], list[Row]]]]:
    if bases is None:
        no_root = that("a Dockerfile is built", ok=True, value="not shown: containers need root", wanted="-")
        return [("builds", lambda: [no_root])]
    builds = BuildSteps(stage, bases)
    return [
        ("a Dockerfile of four stages, the first time", builds.first),
        ("the same again", builds.again),
        ("one byte of hello.c changed", builds.changed),
        ("two drivers build a new variant at the same time", builds.together),
        ("what they built: pushed, and pulled back by others", builds.pushed),
    ]


def _images(reference: str | None, directory: str, say: Callable[[str], None]) -> tuple[LayoutImage, Bases | None]:
    say("making images to show it with (once a machine; two minutes)")
    bases = cached_bases() if can_build() else None
    if reference is None:
        return cached_image(), bases
    say(f"copying {reference}, to be served from a registry whose log can be read")
    is_loopback = reference.startswith(("127.", "localhost:", "[::1]"))
    return fetch(reference, Path(directory) / "layout", plain_http=is_loopback), bases


if __name__ == "__main__":
    raise SystemExit(main())
