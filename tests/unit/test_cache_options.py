"""Where caches go and come from: what people may write, and what they are told otherwise."""

import pytest

from cluster import wire
from cluster.cache_options import (
    BucketCache,
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
BUCKET = BucketCache(bucket="caches", prefix="team/a", name="main")
WORDS = "letters, digits, '.', '_' and '-', and does not start with '.'"


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
        (
            "type=s3,bucket=caches,prefix=team/a,name=main,mode=max",
            CacheTarget(kind=CacheKind.S3, bucket=BUCKET, mode=CacheMode.MAX),
        ),
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
        ("type=s3,bucket=caches,prefix=team/a,name=main", CacheSource(kind=CacheKind.S3, bucket=BUCKET)),
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
        ("type=gha,ref=r.example/c", "type is 'gha' and must be one of registry, inline, s3"),
        ("type=registry,ref=r.example/c,mode=most", "mode is 'most' and must be one of min, max"),
        ("type=registry,ref=r.example/c,ignore-error=yes", "ignore-error is 'yes' and must be true or false"),
        ("type=registry,ref=r.example/c,level=3", "there is no level here; known: ignore-error, mode, ref, type"),
        ("type=registry,ref=r.example/c,ref=r.example/d", "ref is given twice"),
        ("type=registry,r.example/c", "'r.example/c' is not KEY=VALUE"),
        ("type=s3,bucket=caches,name=main", "it has no prefix"),
        ("type=s3,bucket=Caches,prefix=a,name=b", "a bucket has 3 to 63 lower-case letters, digits, '.' and '-'"),
        ("type=s3,bucket=caches,prefix=a/../b,name=b", f"a prefix has {WORDS}, in parts joined by '/'"),
        ("type=s3,bucket=caches,prefix=/a,name=b", f"a prefix has {WORDS}, in parts joined by '/'"),
        ("type=s3,bucket=caches,prefix=a,name=b/c", f"a name has {WORDS}"),
        (
            "type=s3,bucket=caches,prefix=blobs/x,name=b",
            "a farm keeps its own objects there, and removes all others",
        ),
        ("type=s3,ref=r.example/c", "there is no ref here; known: bucket, ignore-error, mode, name, prefix, type"),
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
    for kind in ("inline", "s3"):
        with pytest.raises(MalformedPayloadError):
            wire.decode("s", CacheSource, wire.encode("s", {"kind": kind}))


def test_a_bucket_is_named_for_people_and_as_a_provider():
    """Where its manifest is; and of all its blobs, one handle."""
    source = CacheSource(kind=CacheKind.S3, bucket=BUCKET)
    assert source.name == "s3://caches/team/a/manifests/main"
    assert wire.decode("s", CacheSource, wire.encode("s", source)) == source
    assert (BUCKET.handle.kind, BUCKET.handle.source) == ("s3", "s3/caches/team/a")
