"""What a shell offers in place of a word that is typed: names of the farm's jobs, images, leases and nodes.

A tab is no command: who has no farm, or one that doesn't answer at once, is offered nothing, and told nothing. Only
the farm of a state directory is asked, by its Redis; over a gateway nothing is offered.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import typer

from lazyfarm.gateway.access import gateway_url

if TYPE_CHECKING:
    from storage.keys import Keys
    from storage.link import RedisLink

#: A name, and what to say of it.
Offer: TypeAlias = tuple[str, str]

#: Seconds for all that is asked of a farm for a tab; beyond loopback nobody would wait for more.
_PATIENCE_S = 1.0
_MOST = 200
#: Tells that bash asks, as typer's script for it has it.
_ASKED_BY_BASH = ("_LAZYFARM_COMPLETE", "complete_bash")
#: Words that bash makes of one at the characters of its COMP_WORDBREAKS.
_BREAK = re.compile(r"[:=]+\Z")


def jobs(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the last jobs, newest first."""

    async def offered(link: RedisLink, keys: Keys) -> Iterable[Offer]:
        from lazyfarm.jobs import RedisJobs  # noqa: PLC0415 - only a tab needs it, as all below

        return [(job.id, job.state.value) for job in await RedisJobs.over(link, keys).newest()]

    return _of_farm(ctx, incomplete, offered)


def refs(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the images that were pulled or built, and refs once their ID is begun."""

    async def offered(link: RedisLink, keys: Keys) -> Iterable[Offer]:
        from storage.refs import RedisRefStore  # noqa: PLC0415

        store = RedisRefStore(link, keys)
        named = [(image.name, "") for image in await store.images()]
        return [*named, *((ref, "") for ref in await store.list_refs())] if incomplete else named

    return _of_farm(ctx, incomplete, offered)


def leases(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the live leases."""

    async def offered(link: RedisLink, keys: Keys) -> Iterable[Offer]:
        from storage.leases import RedisLeaseStore  # noqa: PLC0415

        found = await RedisLeaseStore(link, keys).leases()
        return [(lease.id, " ".join(f"{name}={value}" for name, value in lease.labels.items())) for lease in found]

    return _of_farm(ctx, incomplete, offered)


def nodes(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the farm's nodes."""

    async def offered(link: RedisLink, keys: Keys) -> Iterable[Offer]:
        from storage.presence import Presence  # noqa: PLC0415

        return [(node.id, node.state) for node in await Presence(link, keys).nodes()]

    return _of_farm(ctx, incomplete, offered)


def config_keys(incomplete: str) -> list[Offer]:
    """Offer every key of the configuration."""
    from lazyfarm.config_reference import every_key  # noqa: PLC0415

    return _begun(((key.key, f"default {key.default}") for key in every_key()), incomplete)


def one_of(*words: str) -> Callable[[str], list[Offer]]:
    """Return what offers *words*."""

    def offer(incomplete: str) -> list[Offer]:
        return _begun(((word, "") for word in words), incomplete)

    return offer


def _begun(offered: Iterable[Offer], incomplete: str) -> list[Offer]:
    return [offer for offer in offered if offer[0].startswith(incomplete)][:_MOST]


def _of_farm(
    ctx: typer.Context, incomplete: str, ask: Callable[[RedisLink, Keys], Awaitable[Iterable[Offer]]]
) -> list[Offer]:
    """Return what a farm offers; nothing where none answers at once, whatever the reason."""
    state_dir: str | None = ctx.params.get("state_dir")
    if gateway_url(state_dir, None, os.environ) is not None:
        return []

    async def asked() -> Iterable[Offer]:
        from lazyfarm.redis_only import connection  # noqa: PLC0415
        from lazyfarm.settings import load_settings  # noqa: PLC0415

        settings = load_settings(state_dir, None, os.environ)
        if settings.running is None:
            return []
        async with asyncio.timeout(_PATIENCE_S), connection(settings) as (link, keys):
            return await ask(link, keys)

    import asyncio  # noqa: PLC0415

    try:
        return _begun(asyncio.run(asked()), incomplete)
    except Exception:  # noqa: BLE001 - a traceback amid what somebody types helps nobody; the command itself will tell
        return []


@contextlib.contextmanager
def words_of_bash() -> Iterator[None]:
    """Have bash's words be those that were typed, and its answers what it has still to insert.

    Bash breaks ``--progress=pl`` and ``host:5000/app`` into three, and puts what is chosen in the last one's place.
    """
    name, value = _ASKED_BY_BASH
    if os.environ.get(name) != value or "\n" not in os.environ.get("COMP_WORDS", ""):
        yield
        return
    words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    whole, before = words[:1], ""
    for last, word in itertools.pairwise(words):
        before = whole.pop() if _BREAK.match(word) or _BREAK.match(last) else ""
        whole.append(before + word)
    if _BREAK.match(words[-1]):  # nothing of the next one is there: what is chosen comes after it
        before = whole[-1]
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = " ".join(whole), str(len(whole) - 1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        sys.stdout.write("".join(line.removeprefix(before) for line in said.getvalue().splitlines(keepends=True)))
