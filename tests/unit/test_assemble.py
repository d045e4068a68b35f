"""Assembling: manifest and config of a chain, as BuildKit's exporter would write them, the same bytes every time."""

import json

import pytest

from cluster.assemble import assemble_image
from cluster.descriptor import ANNOTATION_DIFF_ID, MANIFEST_OCI
from cluster.digest import digest_of
from cluster.errors import InvalidArgumentError, MalformedManifestError
from cluster.image import MAX_MANIFEST_BYTES, Manifest, parse_config, parse_manifest
from cluster.ref import RefRecord, RefState
from cluster.reference import Platform
from tests.doubles.fetch import layer_of

HERE = Platform.of("linux", "arm", "v7")
#: 2024-01-02T03:04:05Z.
NOW_S = 1_704_164_645
NOW = "2024-01-02T03:04:05Z"
BEFORE, AFTER = "2020-05-06T07:08:09.123456789Z", "2030-01-01T00:00:00+01:00"
A, B, C = (layer_of(name.encode()) for name in "abc")
CONFIG = {"os": "linux", "architecture": "amd64", "config": {"Cmd": ["/bin/sh"]}}


def chain_of(*layers, created_wall_s=NOW_S + 0.75, descriptions=()):
    """Return the states of a chain; its top was recorded at that time, those below before."""
    states, top = [], None
    for number, layer in enumerate(layers):
        fresh = RefRecord.over(layer, top)
        top = RefRecord(
            **{
                **{name: getattr(fresh, name) for name in RefRecord.__dataclass_fields__},
                "created_wall_s": created_wall_s if layer is layers[-1] else 5.0,
                "description": descriptions[number] if number < len(descriptions) else "",
            }
        )
        states.append(RefState(record=top, present=None, providers=()))
    return states


def assemble(chain, config=CONFIG, *, created_s=None):
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    return assemble_image("r.example/app:1", chain, data, created_s=created_s, platform=HERE)


def config_of(chain, config=CONFIG, *, created_s=None):
    return json.loads(assemble(chain, config, created_s=created_s).config_bytes)


def test_what_is_assembled_is_an_image():
    """Our own parser takes it: descriptors, diff IDs and platform agree."""
    image = assemble(chain_of(A, B))
    manifest = parse_manifest(image.manifest_bytes, "", "x")
    assert isinstance(manifest, Manifest)
    assert (manifest.descriptor, manifest.config) == (image.manifest, image.config)
    assert [layer.digest for layer in manifest.layers] == [A.digest, B.digest]
    config = parse_config(image.config_bytes, "x")
    assert config.diff_ids == (A.diff_id, B.diff_id)
    assert config.platform == image.platform == Platform.of("linux", "amd64")
    assert image.manifest.media_type == MANIFEST_OCI
    assert (image.config.digest, image.config.size_bytes) == (digest_of(image.config_bytes), len(image.config_bytes))
    assert image.layers == (A, B)


def test_a_rebuild_that_is_cached_gives_the_same_image():
    """Nothing is taken from now: the top ref says when, and keys are sorted."""
    shuffled = dict(reversed(list(CONFIG.items())))
    assert assemble(chain_of(A, B)) == assemble(chain_of(A, B), shuffled)
    assert config_of(chain_of(A, B))["created"] == NOW


def test_an_image_without_layers_is_one():
    """Scratch with a config; without a time of its own it is as old as time."""
    document = config_of([])
    assert (document["rootfs"]["diff_ids"], document["history"]) == ([], [])
    assert document["created"] == "1970-01-01T00:00:00Z"


def test_an_empty_config_becomes_the_least_that_is_valid():
    """It runs on what the farm runs on."""
    image = assemble(chain_of(A), b"")
    document = json.loads(image.config_bytes)
    assert {key: document[key] for key in ("os", "architecture", "variant")} == {
        "os": "linux",
        "architecture": "arm",
        "variant": "v7",
    }
    assert image.platform == HERE


def test_what_a_build_said_stays_and_the_rootfs_does_not():
    """A base's diff IDs are not those of what was built upon it; labels, authors and unknown keys are kept."""
    said = {**CONFIG, "author": "a", "x.unknown": [1], "rootfs": {"type": "layers", "diff_ids": [C.diff_id]}}
    document = config_of(chain_of(A), said)
    assert (document["author"], document["x.unknown"], document["config"]) == ("a", [1], CONFIG["config"])
    assert document["rootfs"] == {"type": "layers", "diff_ids": [A.diff_id]}


# -- history -------------------------------------------------------------------------------------------------


def test_a_layer_without_an_entry_gets_one():
    """What is told is of the lowest layers; for the others their records say what they are."""
    history = [{"created_by": "ADD rootfs", "created": BEFORE}, {"created_by": "ENV X", "empty_layer": True}]
    document = config_of(chain_of(A, B, C, descriptions=["", "RUN make"]), {**CONFIG, "history": history})
    assert document["history"] == [
        {"created_by": "ADD rootfs", "created": BEFORE},
        {"created_by": "ENV X", "created": NOW, "empty_layer": True},
        {"created_by": "RUN make", "comment": "lazyfarm", "created": NOW},
        {"comment": "lazyfarm", "created": NOW},
    ]


def test_an_entry_without_a_layer_is_one_of_an_empty_layer():
    """A step that changed nothing left none: entries too many are said to be empty, from the end."""
    history = [{"created_by": name} for name in ("one", "two", "three")]
    document = config_of(chain_of(A, B), {**CONFIG, "history": history})
    assert [entry.get("empty_layer", False) for entry in document["history"]] == [False, False, True]


def test_history_always_has_as_many_entries_as_layers():
    """What readers check (umoci refuses others): also where nothing was told."""
    for history in (None, [], [{"empty_layer": True}], [{}] * 5):
        document = config_of(chain_of(A, B), {**CONFIG, "history": history})
        assert sum(not entry.get("empty_layer") for entry in document["history"]) == 2


# -- times ---------------------------------------------------------------------------------------------------


def test_without_a_time_of_its_own_what_is_said_stays():
    """Only what is missing, or no time, is filled in."""
    history = [{"created": BEFORE}, {"created": AFTER}, {"created": "yesterday"}, {"created": 5}]
    document = config_of(chain_of(A, B, C), {**CONFIG, "created": AFTER, "history": history})
    assert document["created"] == AFTER
    assert [entry["created"] for entry in document["history"]] == [BEFORE, AFTER, NOW, NOW]


def test_with_a_time_nothing_is_later():
    """SOURCE_DATE_EPOCH: when it was built leaves no trace; what is older, of a base, is true."""
    history = [{"created": BEFORE}, {"created": AFTER}, {}]
    said = {**CONFIG, "created": AFTER, "history": history}
    documents = [config_of(chain_of(A, B, C, created_wall_s=when), said, created_s=NOW_S) for when in (7.0, 8.0e9)]
    assert documents[0] == documents[1]
    assert documents[0]["created"] == NOW
    assert [entry["created"] for entry in documents[0]["history"]] == [BEFORE, NOW, NOW]


def test_a_time_that_is_none_is_refused():
    """Beyond what a date can say."""
    with pytest.raises(InvalidArgumentError):
        assemble(chain_of(A), created_s=10**15)


# -- layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docker", "oci"),
    [
        ("vnd.docker.image.rootfs.diff.tar", "vnd.oci.image.layer.v1.tar"),
        ("vnd.docker.image.rootfs.diff.tar.gzip", "vnd.oci.image.layer.v1.tar+gzip"),
        ("vnd.docker.image.rootfs.diff.tar.zstd", "vnd.oci.image.layer.v1.tar+zstd"),
        ("vnd.docker.image.rootfs.foreign.diff.tar", "vnd.oci.image.layer.nondistributable.v1.tar"),
        ("vnd.docker.image.rootfs.foreign.diff.tar.gzip", "vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
    ],
)
def test_dockers_layers_are_called_by_their_oci_names(docker, oci):
    """The same bytes: one manifest has one kind of media type. A foreign one keeps its addresses."""
    layer = layer_of(b"d", media_type=f"application/{docker}", urls=("https://x.example/blob",))
    image = assemble(chain_of(layer))
    (described,) = json.loads(image.manifest_bytes)["layers"]
    assert (described["mediaType"], described["urls"]) == (f"application/{oci}", ["https://x.example/blob"])
    assert (image.layers[0].diff_id, image.layers[0].is_foreign) == (layer.diff_id, layer.is_foreign)


def test_a_builders_notes_to_itself_are_not_told():
    """Annotations that others read stay (eStargz's table of contents); where a layer was pulled from does not."""
    kept = {"containerd.io/snapshot/stargz/toc.digest": "sha256:1"}
    notes = {
        ANNOTATION_DIFF_ID: A.diff_id,
        "containerd.io/distribution.source.r.example": "private/base",
        "buildkit/createdat": BEFORE,
    }
    layer = layer_of(b"d", annotations={**kept, **notes})
    (described,) = json.loads(assemble(chain_of(layer)).manifest_bytes)["layers"]
    assert described["annotations"] == kept


# -- what is no config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [b"{", b"[]", b"\xff", b'{"a": NaN}', b'{"history": 5}', b'{"history": [5]}', b"[" * 100_000],
    ids=["truncated", "list", "no text", "no JSON", "history", "entry", "deep"],
)
def test_what_is_no_config_is_refused(config):
    """Named, before anything is written."""
    with pytest.raises(MalformedManifestError, match=r"config of r\.example/app:1"):
        assemble(chain_of(A), config)


def test_an_image_that_registries_would_refuse_is_refused_here():
    """Larger than any registry takes; ours wouldn't read it back either."""
    with pytest.raises(MalformedManifestError):
        assemble(chain_of(A), {**CONFIG, "author": "x" * MAX_MANIFEST_BYTES})
