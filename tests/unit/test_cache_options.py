"""Where caches go and come from: what people may write, and what they are told otherwise."""

import pytest

from cluster import wire
from cluster.cache_options import (
    CacheKind,
    CacheMode,
    CacheSource,
    CacheTarget,
    parse_cache_source,
    parse_cache_target,
)
from cluster.digest import digest_of
from cluster.errors import CacheOptionError, MalformedPayloadError

DIGEST = digest_of(b"manifest")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("r.example/app/cache:1", CacheTarget(kind=CacheKind.REGISTRY, ref="r.example/app/cache:1")),
        ("app", CacheTarget(kind=CacheKind.REGISTRY, ref="docker.io/library/app:latest")),
        ("type=registry,ref=r.example/c", CacheTarget(kind=CacheKind.REGISTRY, ref="r.example/c:latest")),
        (
            "type=registry, ref=r.example/c:2, mode=max, ignore-error=true",
            CacheTarget(kind=CacheKind.REGISTRY, ref="r.example/c:2", mode=CacheMode.MAX, ignores_error=True),
        ),
        ("type=inline", CacheTarget(kind=CacheKind.INLINE)),
    ],
)
def test_what_a_cache_goes_to(text, target):
    """A name is a registry's; min and strict unless said otherwise."""
    assert parse_cache_target(text) == target


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("r.example/app:1", CacheSource(kind=CacheKind.REGISTRY, ref="r.example/app:1")),
        (f"r.example/app@{DIGEST}", CacheSource(kind=CacheKind.REGISTRY, ref=f"r.example/app@{DIGEST}")),
        ("type=registry,ref=r.example/app", CacheSource(kind=CacheKind.REGISTRY, ref="r.example/app:latest")),
    ],
)
def test_what_a_cache_comes_from(text, source):
    """A name is a registry's; by digest as well, since nothing is written there."""
    assert parse_cache_source(text) == source


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it has no ref"),
        ("type=registry", "it has no ref"),
        ("ref=r.example/c", "it has no type"),
        ("type=gha,ref=r.example/c", "type is 'gha' and must be one of registry, inline"),
        ("type=registry,ref=r.example/c,mode=most", "mode is 'most' and must be one of min, max"),
        ("type=registry,ref=r.example/c,ignore-error=yes", "ignore-error is 'yes' and must be true or false"),
        ("type=registry,ref=r.example/c,level=3", "there is no level here; known: ignore-error, mode, ref, type"),
        ("type=registry,ref=r.example/c,ref=r.example/d", "ref is given twice"),
        ("type=registry,r.example/c", "'r.example/c' is not KEY=VALUE"),
        ("type=inline,mode=max", "there is no mode here; known: type"),
        ("type=registry,ref=r.example/C", "ref: the repository must be in lower case"),
        (f"r.example/c@{DIGEST}", "a cache is written under a tag, not under a digest"),
    ],
)
def test_what_is_wrong_with_a_target_is_named(text, reason):
    """The option, what was written, and which part of it can't be meant."""
    with pytest.raises(CacheOptionError) as caught:
        parse_cache_target(text)
    assert (caught.value.option, caught.value.text, caught.value.reason) == ("--cache-to", text, reason)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("type=inline", "read an image's inline cache with type=registry,ref=IMAGE"),
        ("type=registry,ref=r.example/c,mode=max", "there is no mode here; known: ref, type"),
        ("type=registry,ref=", "it has no ref"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(text, reason):
    """Likewise; and where an inline cache is read from."""
    with pytest.raises(CacheOptionError) as caught:
        parse_cache_source(text)
    assert (caught.value.option, caught.value.reason) == ("--cache-from", reason)


def test_targets_and_sources_travel_in_payloads():
    """They are part of what a driver asks for; what is wrong with one is found there too."""
    target = parse_cache_target("type=registry,ref=r.example/c:2,mode=max,ignore-error=true")
    source = parse_cache_source("r.example/c:2")
    assert wire.decode("t", CacheTarget, wire.encode("t", target)) == target
    assert wire.decode("s", CacheSource, wire.encode("s", source)) == source
    with pytest.raises(MalformedPayloadError):
        wire.decode("s", CacheSource, wire.encode("s", {"kind": "registry", "ref": "r.example/C"}))
    with pytest.raises(MalformedPayloadError):
        wire.decode("s", CacheSource, wire.encode("s", {"kind": "inline"}))
