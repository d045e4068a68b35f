"""Manifests, indexes and configs: what is taken, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from cluster.descriptor import (
    CONFIG_OCI,
    INDEX_DOCKER,
    INDEX_OCI,
    MANIFEST_DOCKER,
    MANIFEST_OCI,
    SCHEMA1,
    Descriptor,
)
from cluster.digest import digest_of
from cluster.errors import (
    DigestMismatchError,
    MalformedManifestError,
    PlatformNotFoundError,
    SizeMismatchError,
    UnsupportedManifestError,
)
from cluster.image import (
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    Index,
    Manifest,
    assemble,
    choose,
    parse_config,
    parse_manifest,
    verify,
    verify_descriptor,
)
from cluster.reference import parse_platform, parse_reference

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
REFERENCE = parse_reference("quay.io/a:1")
AMD64 = parse_platform("linux/amd64")


def descriptor(name, media_type=LAYER, **more):
    return {"mediaType": media_type, "digest": digest_of(name.encode()), "size": len(name), **more}


def manifest(*layers, **more):
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_OCI,
        "config": descriptor("config", CONFIG_OCI),
        "layers": list(layers),
        **more,
    }


def index(*platforms, **more):
    entries = []
    for text in platforms:
        entry = descriptor(text or "none", MANIFEST_OCI)
        if text:
            os, architecture, *variant = text.split("/")
            entry["platform"] = {"os": os, "architecture": architecture}
            if variant:
                entry["platform"]["variant"] = variant[0]
        entries.append(entry)
    return {"schemaVersion": 2, "mediaType": INDEX_OCI, "manifests": entries, **more}


def config(*names, **more):
    diff_ids = [digest_of(name.encode()) for name in names]
    return {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}, **more}


def parse(document, content_type=""):
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_manifest(data, content_type, "quay.io/a:1")


def put_together(document, image_config, *, wanted=AMD64, listed=None):
    return assemble(
        REFERENCE,
        parse(document),
        manifest_bytes=b"",
        config_bytes=json.dumps(image_config).encode(),
        wanted=wanted,
        listed=listed,
    )


# -- manifests ----------------------------------------------------------------------------------------------


def test_a_manifests_descriptor_is_of_its_bytes():
    """Digest and size are of what was read, whatever anybody claims."""
    data = json.dumps(manifest(descriptor("a"))).encode()
    found = parse(data)
    assert isinstance(found, Manifest)
    assert found.descriptor == Descriptor(media_type=MANIFEST_OCI, digest=digest_of(data), size_bytes=len(data))
    assert [layer.digest for layer in found.layers] == [digest_of(b"a")]


def test_the_media_type_comes_from_the_document_then_the_header_then_the_shape():
    """OCI lets mediaType out; registries serve all sorts of content types."""
    bare = manifest()
    del bare["mediaType"]
    assert parse(bare, f"{MANIFEST_DOCKER}; charset=utf-8").descriptor.media_type == MANIFEST_DOCKER
    assert parse(bare, "application/json").descriptor.media_type == MANIFEST_OCI
    assert parse(manifest(), "text/plain").descriptor.media_type == MANIFEST_OCI
    bare = index("linux/amd64")
    del bare["mediaType"]
    assert parse(bare, INDEX_DOCKER).descriptor.media_type == INDEX_DOCKER
    assert isinstance(parse(bare), Index)


@pytest.mark.parametrize(
    ("document", "content_type"),
    [
        ({"schemaVersion": 1, "name": "a", "fsLayers": []}, ""),
        (manifest(), None),
        ({"schemaVersion": 2, "mediaType": min(SCHEMA1)}, ""),
    ],
)
def test_schema_1_is_refused_by_name(document, content_type):
    """By its version, its own media type or its content type."""
    if content_type is None:
        del document["mediaType"]
        content_type = max(SCHEMA1)
    with pytest.raises(UnsupportedManifestError, match="schema 1"):
        parse(document, content_type)


@pytest.mark.parametrize(
    "document",
    [
        {"schemaVersion": 2, "mediaType": "application/vnd.oci.artifact.manifest.v1+json"},
        manifest(descriptor("a", "application/vnd.cncf.helm.chart.content.v1.tar+gzip")),
    ],
)
def test_what_is_no_image_is_unsupported(document):
    """Artifacts and layers of unknown kinds are named with their media type."""
    with pytest.raises(UnsupportedManifestError, match=r"application/vnd\."):
        parse(document)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "larger than"),
        (manifest(manifests=[]), "index and as a manifest"),
        (index("linux/amd64", config={}), "index and as a manifest"),
        (index("linux/amd64", mediaType=MANIFEST_OCI), "contents"),
        (manifest(mediaType=INDEX_OCI), "contents"),
        (manifest(mediaType=7), "mediaType"),
        (manifest(config=None), "config is not a descriptor"),
        (manifest(layers={}), "layers is not a list"),
        (manifest("a"), "layer is not a descriptor"),
        (manifest({"mediaType": LAYER}), "lacks"),
        (manifest(descriptor("a", size=True)), "lacks"),
        (manifest(descriptor("a", size=-1)), "size is -1"),
        (manifest(descriptor("a", digest="sha256:../../etc")), "malformed"),
        (manifest(descriptor("a", annotations={"a": 1})), "annotations"),
        (manifest(descriptor("a", urls="https://x")), "urls"),
        ({"schemaVersion": 2, "mediaType": INDEX_OCI, "manifests": None}, "manifests is not a list"),
    ],
    ids=lambda value: value[:20] if isinstance(value, (str, bytes)) else None,
)
def test_what_contradicts_itself_is_malformed(document, reason):
    """One typed error, which says what is wrong."""
    with pytest.raises(MalformedManifestError, match=reason):
        parse(document)


def test_a_document_served_as_something_else_is_refused():
    """Two clients must not take one digest for two things."""
    with pytest.raises(MalformedManifestError, match="served as"):
        parse(manifest(), MANIFEST_DOCKER)


def test_foreign_layers_keep_their_addresses():
    """A non-distributable layer says where it is to be had."""
    layer = descriptor("a", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", urls=["https://x/a"])
    found = parse(manifest(layer))
    assert found.layers[0].is_foreign
    assert found.layers[0].urls == ("https://x/a",)


# -- indexes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        ("linux/amd64", ["linux/386", "linux/amd64"], "linux/amd64"),
        ("linux/arm64", ["linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm64/v8", ["linux/arm64"], "linux/arm64"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm/v7", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/amd64/v3", ["linux/amd64"], "linux/amd64"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], "linux/amd64/v2"),
    ],
)
def test_the_best_match_of_an_index_is_chosen(wanted, available, chosen):
    """The platform itself, else its newest older variant."""
    found = choose(parse(index(*available)), parse_platform(wanted), "a")
    assert found.manifest.digest == digest_of(chosen.encode())


@pytest.mark.parametrize(
    ("wanted", "available"),
    [("linux/arm64", ["linux/amd64"]), ("linux/arm/v6", ["linux/arm/v7"]), ("linux/amd64", ["linux/amd64/v3"])],
)
def test_what_would_not_run_is_not_chosen(wanted, available):
    """A newer variant, another architecture: the error lists what there is, attestations left out."""
    with pytest.raises(PlatformNotFoundError) as caught:
        choose(parse(index(*available, "unknown/unknown", "")), parse_platform(wanted), "a")
    assert caught.value.available == tuple(str(parse_platform(one)) for one in available)


# -- configs ------------------------------------------------------------------------------------------------


def test_every_layer_gets_its_diff_id():
    """Layers and diff IDs are paired in order, lowest first."""
    found = put_together(manifest(descriptor("a"), descriptor("b")), config("A", "B"))
    assert [(layer.digest, layer.diff_id) for layer in found.layers] == [
        (digest_of(b"a"), digest_of(b"A")),
        (digest_of(b"b"), digest_of(b"B")),
    ]
    assert str(found.platform) == "linux/amd64"


def test_an_image_without_layers_is_one():
    """No layers and no diff IDs, in any of the ways in which that is written."""
    for rootfs in ({"type": "layers"}, {"type": "layers", "diff_ids": None}, {"type": "layers", "diff_ids": []}):
        assert put_together(manifest(), config(rootfs=rootfs)).layers == ()


@pytest.mark.parametrize("diff_ids", [["A"], ["A", "B", "C"]])
def test_another_number_of_diff_ids_is_refused(diff_ids):
    """Whose layer would which diff ID be?"""
    with pytest.raises(MalformedManifestError, match="2 layers"):
        put_together(manifest(descriptor("a"), descriptor("b")), config(*diff_ids))


def test_an_image_of_very_many_layers_is_refused():
    """Each is a record and may be a bomb; no kernel mounts that many."""
    layers = [descriptor("a")] * (MAX_LAYERS + 1)
    with pytest.raises(MalformedManifestError, match=f"more than {MAX_LAYERS}"):
        put_together(manifest(*layers), config(*["A"] * len(layers)))
    assert len(put_together(manifest(*layers[1:]), config(*["A"] * MAX_LAYERS)).layers) == MAX_LAYERS


@pytest.mark.parametrize("document", [{}, {"rootfs": []}, {"rootfs": {"diff_ids": ["x"]}}, {"rootfs": {"diff_ids": 1}}])
def test_a_config_without_diff_ids_is_malformed(document):
    """What is no image config is refused as one."""
    with pytest.raises(MalformedManifestError, match="diff_ids"):
        parse_config(json.dumps(document).encode(), "a")


def test_an_image_for_another_platform_is_refused_unless_an_index_listed_it():
    """Without an index the config decides; with one the index does, as configs are often wrong there."""
    other = config("A", architecture="arm64")
    with pytest.raises(PlatformNotFoundError) as caught:
        put_together(manifest(descriptor("a")), other)
    assert caught.value.available == ("linux/arm64",)
    assert put_together(manifest(descriptor("a")), other, listed=AMD64).platform == AMD64
    assert put_together(manifest(descriptor("a")), config("A", os="", architecture="")).platform == AMD64


# -- bytes --------------------------------------------------------------------------------------------------


def test_bytes_are_checked_against_what_was_asked_for():
    """Digest and size, each its own error that names the source."""
    assert verify(b"a", None, "quay.io/a") == digest_of(b"a")
    with pytest.raises(DigestMismatchError, match="quay"):
        verify(b"a", digest_of(b"b"), "quay.io/a")
    wanted = Descriptor(media_type="x/y", digest=digest_of(b"ab"), size_bytes=2)
    verify_descriptor(b"ab", wanted, "quay.io/a")
    with pytest.raises(SizeMismatchError):
        verify_descriptor(b"abc", wanted, "quay.io/a")
    with pytest.raises(DigestMismatchError):
        verify_descriptor(b"xy", wanted, "quay.io/a")
