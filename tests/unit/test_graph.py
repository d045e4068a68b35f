"""Build graphs: what definitions refuse, what they are called, and what drivers' states come to."""

from __future__ import annotations

import time
from dataclasses import replace

import msgpack
import pytest

from cluster import wire
from cluster.digest import digest_of
from cluster.errors import (
    BuildArgumentError,
    CycleError,
    EmptyGraphError,
    InputCountError,
    InputIndexError,
    InvalidPatternError,
    InvalidReferenceError,
    MalformedOpError,
    MalformedPayloadError,
    ScanError,
    UnknownOpError,
    UnknownVersionError,
    UnknownVertexError,
    UnneededVertexError,
    VertexDigestError,
)
from cluster.graph import (
    BindMount,
    CacheMount,
    CopyAction,
    Definition,
    DiffOp,
    FileOp,
    ImageOp,
    Limits,
    LocalOp,
    MakeDirectory,
    MakeFile,
    MergeOp,
    Network,
    RunOp,
    SecretMount,
    Sharing,
    TmpfsMount,
    Vertex,
    content_inputs,
    decode_definition,
    encode_definition,
    image_registries,
    op_digest,
    pinned,
)
from cluster.reference import parse_reference
from lazyfarm.graph import bind, cache, image, local, merge, resolve, scratch, secret, tmpfs

BASE = Vertex(ImageOp(reference="docker.io/library/debian:12"))
LOCAL = Vertex(LocalOp(tree=digest_of(b"tree")))
MAKE = RunOp(args=("make",))
RUN = Vertex(MAKE, (BASE.digest,))
OTHER = digest_of(b"other")


def definition(*vertices: Vertex, names=None) -> Definition:
    """A definition whose target is the last vertex."""
    return Definition({vertex.digest: vertex for vertex in vertices}, (vertices[-1].digest,), names or {})


# -- vertices -----------------------------------------------------------------------------------------


def test_equal_work_has_one_digest():
    """Vertices made apart are equal and have one digest, whatever their numbers' types."""
    limits = Limits(memory_bytes=1, cpus=2)

    assert Vertex(MAKE, (BASE.digest,)).digest == RUN.digest
    assert Vertex(replace(MAKE, limits=limits)) == Vertex(replace(MAKE, limits=Limits(memory_bytes=1, cpus=2.0)))


@pytest.mark.parametrize(
    "other",
    [
        Vertex(RunOp(args=("make", "")), (BASE.digest,)),
        Vertex(RunOp(args=("make",), network=Network.HOST), (BASE.digest,)),
        Vertex(MAKE, (LOCAL.digest,)),
        Vertex(MAKE, (None,)),
        Vertex(MAKE, ()),
    ],
)
def test_other_work_has_another_digest(other):
    """Whatever differs in the op or its inputs changes the digest."""
    assert other.digest != RUN.digest


def test_ops_with_equal_fields_differ_by_kind():
    """What an op is, is part of the digest: merge and diff have no fields at all."""
    inputs = (BASE.digest, LOCAL.digest)
    actions = (MakeDirectory(path="/a"), MakeFile(path="/a", data=b"", mode=0o755))

    assert Vertex(MergeOp(), inputs).digest != Vertex(DiffOp(), inputs).digest
    assert len({Vertex(FileOp(actions=(action,)), (None,)).digest for action in actions}) == 2


def test_digests_stay_as_they_are():
    """A digest is the same in every process and release: shared caches rest on it."""
    assert BASE.digest == "sha256:f377efa42d6f192eba01cd274545d1ba261fda9ce39f4c5386ce7ad1e79e5dea"


def test_the_way_of_a_command_to_the_network_is_in_no_digest():
    """Nor does what was cached before there was such a thing get another one."""
    there = replace(MAKE, proxy_env=(("HTTP_PROXY", "p"),))

    assert op_digest(there) == op_digest(MAKE)
    assert Vertex(there, (BASE.digest,)).digest == RUN.digest
    assert RUN.digest == "sha256:5d2084925851c1e28c37d14f4760306df6fb646947319a74390d8bf810ac9163"


# -- definitions --------------------------------------------------------------------------------------


def test_order_has_inputs_first():
    """Every vertex comes after its inputs, and once."""
    top = Vertex(MergeOp(), (RUN.digest, BASE.digest, None, LOCAL.digest))

    order = definition(LOCAL, BASE, RUN, top).order

    assert sorted(order) == sorted({LOCAL.digest, BASE.digest, RUN.digest, top.digest})
    assert order.index(BASE.digest) < order.index(RUN.digest) < order.index(top.digest)


def copying(index):
    return CopyAction(input=index, sources=("/a",), destination="/b")


@pytest.mark.parametrize(
    ("error", "op", "inputs"),
    [
        (InputCountError, ImageOp(reference="x"), (None,)),
        (InputCountError, LocalOp(tree=OTHER), (None,)),
        (InputCountError, MAKE, ()),
        (InputCountError, MAKE, (None, None)),
        (InputCountError, MergeOp(), (None,)),
        (InputCountError, DiffOp(), (None,)),
        (InputCountError, DiffOp(), (None, None, None)),
        (InputCountError, FileOp(actions=(MakeDirectory(path="/a"),)), ()),
        (InputCountError, FileOp(actions=(copying(1),)), (None, None, None)),
        (InputIndexError, FileOp(actions=(copying(1),)), (None,)),
        (InputIndexError, FileOp(actions=(copying(0),)), (None,)),
        (InputIndexError, FileOp(actions=(copying(-1),)), (None, None)),
        (InputIndexError, replace(MAKE, binds=(BindMount(target="/x", input=2),)), (None, None)),
        (MalformedOpError, RunOp(args=()), (None,)),
        (MalformedOpError, FileOp(actions=()), (None,)),
        (MalformedOpError, FileOp(actions=(replace(copying(1), sources=()),)), (None, None)),
    ],
)
def test_a_bad_vertex_is_named(error, op, inputs):
    """What is wrong with a vertex is told by type, with its digest and its name."""
    vertex = Vertex(op, inputs)

    with pytest.raises(error) as raised:
        definition(vertex, names={vertex.digest: "step 3"})

    assert (raised.value.vertex, raised.value.name) == (vertex.digest, "step 3")
    assert "step 3" in str(raised.value)


def test_a_cycle_is_found():
    """A vertex that needs itself, by way of others, is refused."""
    first, second = digest_of(b"1"), digest_of(b"2")
    vertices = {first: Vertex(MAKE, (second,)), second: Vertex(MAKE, (first,))}

    with pytest.raises(CycleError) as raised:
        Definition(vertices, (first,))

    assert raised.value.vertex == first


def test_unknown_vertices_are_named():
    """An input, a target or a name of a vertex that is not there is an error."""
    with pytest.raises(UnknownVertexError, match=BASE.digest) as raised:
        definition(RUN)
    assert raised.value.vertex == RUN.digest

    for targets, names in (((OTHER,), {}), ((BASE.digest,), {OTHER: "x"})):
        with pytest.raises(UnknownVertexError) as raised:
            Definition({BASE.digest: BASE}, targets, names)
        assert raised.value.vertex == OTHER


def test_unneeded_vertices_are_refused():
    """A vertex that no target needs would never end: it may not be there."""
    with pytest.raises(UnneededVertexError) as raised:
        definition(LOCAL, BASE)

    assert raised.value.vertex == LOCAL.digest


def test_a_false_digest_is_refused():
    """A vertex may not pass for another one."""
    with pytest.raises(VertexDigestError):
        Definition({OTHER: BASE}, (OTHER,))


def test_no_targets_is_nothing_to_build():
    """A definition wants something."""
    with pytest.raises(EmptyGraphError):
        Definition({}, ())


# -- payloads -----------------------------------------------------------------------------------------

FULL = definition(
    BASE,
    LOCAL,
    full_run := Vertex(
        RunOp(
            args=("sh", "-c", "ü"),
            env=(("A", "b"),),
            binds=(BindMount(target="/src", input=1),),
            caches=(CacheMount(target="/c", id="c", sharing=Sharing.LOCKED),),
            secrets=(SecretMount(id="s", env="S"),),
            tmpfs=(TmpfsMount(target="/t"),),
            limits=Limits(cpus=1.5),
            proxy_env=(("HTTP_PROXY", "p"),),
        ),
        (BASE.digest, LOCAL.digest),
    ),
    full_file := Vertex(
        FileOp(actions=(copying(1), MakeDirectory(path="/d"), MakeFile(path="/f", data=b"\x00\xff"))),
        (None, full_run.digest),
    ),
    full_diff := Vertex(DiffOp(), (BASE.digest, full_file.digest)),
    Vertex(MergeOp(), (full_file.digest, full_diff.digest, None)),
    names={BASE.digest: "base"},
)


def tampered(change) -> bytes:
    """FULL's payload after *change* of its body."""
    version, kind, body = msgpack.unpackb(encode_definition(FULL), strict_map_key=False)
    change(body)
    return msgpack.packb([version, kind, body])


def test_a_definition_comes_back():
    """Every op, mount and action survives its payload, and one definition has one payload."""
    payload = encode_definition(FULL)
    back = decode_definition(payload)

    assert back == FULL
    assert encode_definition(back) == payload


def test_every_cut_is_malformed():
    """A truncated payload is told as such."""
    payload = encode_definition(FULL)

    for length in range(0, len(payload), 7):
        with pytest.raises(MalformedPayloadError):
            decode_definition(payload[:length])


def test_another_releases_payload_is_told():
    """A payload of another version of the form is not misread."""
    with pytest.raises(UnknownVersionError):
        decode_definition(msgpack.packb([wire.VERSION + 1, "definition", {}]))


@pytest.mark.parametrize(
    ("error", "column", "value"),
    [
        (UnknownOpError, 1, "solve"),
        (UnknownOpError, 2, 2),
        (MalformedOpError, 3, {"reference": 7}),
        (MalformedOpError, 3, None),
        (MalformedOpError, 3, {}),
        (VertexDigestError, 3, {"reference": "another"}),
        (VertexDigestError, 4, [None]),
    ],
)
def test_an_op_that_cant_be_read_is_named(error, column, value):
    """An unknown op or version, and fields that are not an op's, name the vertex that they are of."""

    def change(body):
        row = next(row for row in body["vertices"] if row[0] == BASE.digest)
        row[column] = value

    with pytest.raises(error) as raised:
        decode_definition(tampered(change))

    assert (raised.value.vertex, raised.value.name) == (BASE.digest, "base")


def test_an_unknown_file_action_is_named():
    """Likewise for an action of a file op, with a body of any shape."""

    def rename(body):
        row = next(row for row in body["vertices"] if row[0] == full_file.digest)
        row[3]["actions"][0][0] = "chmod"

    with pytest.raises(UnknownOpError, match="chmod") as raised:
        decode_definition(tampered(rename))

    assert raised.value.vertex == full_file.digest


def test_ten_thousand_vertices_take_well_under_a_second():
    """What a driver submits is built, encoded, decoded and checked without being waited for."""
    state = base = image("debian:12")
    for number in range(5_000):
        state = state.run(["make", str(number)], mounts=[bind(base, "/src")]).mkdir(f"/{number}")
    started_s = time.process_time()

    payload = encode_definition(state.definition())
    back = decode_definition(payload)

    # Measured: 0.5 s. Processor time, as the machine may be loaded.
    assert time.process_time() - started_s < 3
    assert len(back.order) == 10_001


# -- states -------------------------------------------------------------------------------------------


def ops(state):
    """A state's ops in order."""
    built = state.definition()
    return [built.vertices[digest].op for digest in built.order]


def test_steps_become_vertices():
    """A chain of steps is a chain of vertices over the image, with what each was given."""
    proxies = {"https_proxy": "q", "http_proxy": "p"}
    state = image("debian").run("make", env={"B": "2", "A": "1"}, cwd="src", network="host", cpus=2, proxy_env=proxies)

    assert ops(state) == [
        ImageOp(reference="docker.io/library/debian:latest"),
        RunOp(
            args=("/bin/sh", "-c", "make"),
            env=(("A", "1"), ("B", "2")),
            cwd="/src",
            network=Network.HOST,
            limits=Limits(cpus=2.0),
            proxy_env=(("http_proxy", "p"), ("https_proxy", "q")),
        ),
    ]


def test_mounts_take_inputs():
    """Bind mounts number their sources as inputs, one that is mounted twice once; others need none."""
    base, tools = image("debian"), image("alpine")
    state = base.run(
        ["true"],
        mounts=[
            bind(tools, "/tools", from_path="usr"),
            cache("/cache", sharing="locked"),
            secret("token"),
            secret("key", env="KEY"),
            tmpfs("/tmp/"),  # noqa: S108 - a path in the container
            bind(tools, "/more"),
            bind(scratch(), "/empty", read_only=False),
        ],
    )
    built = state.definition()
    vertex = built.vertices[built.targets[0]]

    assert [below is None for below in vertex.inputs] == [False, False, True]
    assert [(m.target, m.input, m.source) for m in vertex.op.binds] == [
        ("/tools", 1, "/usr"),
        ("/more", 1, "/"),
        ("/empty", 2, "/"),
    ]
    assert vertex.op.caches == (CacheMount(target="/cache", id="/cache", sharing=Sharing.LOCKED),)
    assert vertex.op.secrets == (
        SecretMount(id="token", target="/run/secrets/token"),
        SecretMount(id="key", env="KEY"),
    )
    assert vertex.op.tmpfs == (TmpfsMount(target="/tmp"),)  # noqa: S108


@pytest.mark.parametrize(
    ("to_path", "destination"),
    [("/a", "/a"), ("a/", "/a/"), ("a/.", "/a/"), (".", "/"), ("/", "/"), ("../x/./y//", "/x/y/"), ("//a", "/a")],
)
def test_a_copys_destination_keeps_its_slash(to_path, destination):
    """Paths are cleaned and from the root; the slash that makes a destination a directory stays."""
    (op,) = ops(scratch().copy(scratch(), "x", to_path))

    assert op.actions[0].destination == destination
    assert op.actions[0].sources == ("/x",)


def test_copying_within_one_state_takes_it_twice():
    """What is copied from may be the state that is copied into."""
    base = image("debian")
    built = base.copy(base, ["/a", "/b"], "/c/").definition()

    assert len(built.vertices) == 2
    assert len(set(built.vertices[built.targets[0]].inputs)) == 1


def test_steps_that_do_nothing_vanish():
    """Merging with scratch alone, and what a state changes of scratch or itself, are no vertices."""
    base = image("debian")
    made = base.mkdir("/a")

    assert ops(merge([scratch(), base])) == ops(base)
    assert ops(made.diff(scratch())) == ops(made)
    assert ops(merge([base, made.diff(made.named("again")), scratch()])) == ops(base)
    assert [type(op) for op in ops(merge([base, made.diff(base)]))] == [ImageOp, FileOp, DiffOp, MergeOp]


def test_scratch_alone_is_nothing_to_build():
    """There is no result without a step."""
    for state in (scratch(), scratch().named("x"), merge([scratch()]), image("debian").diff(image("debian"))):
        with pytest.raises(EmptyGraphError):
            state.definition()


def test_names_are_for_people_only():
    """A step's name changes no digest; without one it is called after what it does."""
    plain = image("debian").run("make all")
    named = image("debian").run("make all").named("compile")

    built = resolve([plain, named]).definition

    assert built.targets[0] == built.targets[1] == plain.definition().targets[0]
    assert sorted(built.names.values()) == ["compile", "image docker.io/library/debian:latest"]
    assert "run make all" in plain.definition().names.values()


def test_local_directories_are_read_with_the_definition(tmp_path):
    """A local directory is its content at the time of the definition, read once for all who use it alike."""
    state = local(tmp_path, exclude=["*.o"])
    (tmp_path / "a.c").write_text("one")
    (tmp_path / "a.o").write_text("two")

    resolved = resolve([scratch().copy(state, ".", "/src/"), local(str(tmp_path), exclude=["*.o"])])
    (tree,) = resolved.trees.values()

    assert [entry.path for entry in tree.tree.entries] == ["a.c"]
    assert LocalOp(tree=tree.digest) in [vertex.op for vertex in resolved.definition.vertices.values()]
    assert f"local {tmp_path}" in resolved.definition.names.values()


def test_a_local_directory_that_is_missing_is_told(tmp_path):
    """It is told when the definition is made, with its path."""
    with pytest.raises(ScanError, match="nowhere"):
        local(tmp_path / "nowhere").definition()


@pytest.mark.parametrize("proxy", ["http://user:pass@proxy:3128", "user@proxy:3128", "http://:tok@proxy/"])
def test_a_proxy_with_a_password_is_refused_and_not_repeated(proxy):
    """A graph is at rest in Redis; an error is in logs."""
    with pytest.raises(BuildArgumentError, match="HTTP_PROXY holds a user or a password") as refused:
        image("debian").run("make", proxy_env={"HTTP_PROXY": proxy})
    assert proxy not in str(refused.value)
    image("debian").run("make", proxy_env={"HTTP_PROXY": "http://proxy:3128/@x", "no_proxy": "a.example,.b"})


@pytest.mark.parametrize(
    "step",
    [
        lambda base: base.run(""),
        lambda base: base.run([]),
        lambda base: base.run(["a", 1]),
        lambda base: base.run("a\0b"),
        lambda base: base.run("a\udc80"),
        lambda base: base.run("a", env={"A=": "x"}),
        lambda base: base.run("a", env={"A": 1}),
        lambda base: base.run("a", proxy_env={"A": 1}),
        lambda base: base.run("a", cwd=""),
        lambda base: base.run("a", network="bridge"),
        lambda base: base.run("a", cpus=-1),
        lambda base: base.run("a", cpus=float("nan")),
        lambda base: base.run("a", memory_bytes=1.5),
        lambda base: base.run("a", mounts=[base]),
        lambda base: base.run("a", mounts=[tmpfs("/x"), cache("/x/")]),
        lambda base: tmpfs("x"),
        lambda base: tmpfs("/x/.."),
        lambda base: bind("debian", "/x"),
        lambda base: cache("/x", sharing="mine"),
        lambda base: cache("/x", mode=0o10000),
        lambda base: secret(""),
        lambda base: secret("x", env="A=B"),
        lambda base: base.copy("src", "/a", "/b"),
        lambda base: base.copy(base, [], "/b"),
        lambda base: base.copy(base, "", "/b"),
        lambda base: base.copy(base, "/a", "/b", mode=True),
        lambda base: base.copy(base, "/a", "/b", exclude="*.o"),
        lambda base: base.mkfile("/", "x"),
        lambda base: merge([]),
        lambda base: merge([base, "x"]),
        lambda base: base.diff(None),
        lambda base: base.named(None),
        lambda base: local(""),
    ],
)
def test_what_cant_be_meant_is_told_at_once(step):
    """A bad argument is an error where it is written, which says of which step and what was given."""
    with pytest.raises(BuildArgumentError):
        step(image("debian"))


def test_references_and_patterns_are_checked_where_they_are_written():
    """Malformed references and patterns are errors of their own types."""
    with pytest.raises(InvalidReferenceError):
        image("https://debian")
    with pytest.raises(InvalidPatternError):
        local(".", include=["["])


# -- keys ---------------------------------------------------------------------------------------------------


def test_the_digest_of_an_op_is_of_the_op_alone():
    """Equal whatever it is over, another for every other op, and no vertex's."""
    ops = [MAKE, replace(MAKE, cwd="/src"), MergeOp(), DiffOp(), ImageOp(reference="x"), LocalOp(tree=OTHER)]
    ops += [FileOp(actions=(copying(1),)), FileOp(actions=(MakeFile(path="/f", data=b""),))]

    assert len({op_digest(op) for op in ops}) == len(ops)
    assert op_digest(replace(MAKE)) == op_digest(MAKE)
    assert op_digest(DiffOp()) != Vertex(DiffOp()).digest


def mounting(index, *, is_read_only=True):
    return BindMount(target=f"/{index}", input=index, is_read_only=is_read_only)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (FileOp(actions=(copying(2), MakeDirectory(path="/d"), copying(1), copying(2))), (1, 2)),
        (FileOp(actions=(MakeDirectory(path="/d"),)), ()),
        (RunOp(args=("x",), binds=(mounting(3), mounting(1), mounting(2, is_read_only=False))), (1, 3)),
        (RunOp(args=("x",), binds=(mounting(1), mounting(1, is_read_only=False))), ()),
        (MAKE, ()),
        (MergeOp(), ()),
        (DiffOp(), ()),
        (LocalOp(tree=OTHER), ()),
        (ImageOp(reference="x"), ()),
    ],
)
def test_content_counts_where_it_is_only_read(op, expected):
    """Of what is copied or mounted read-only everywhere, and never of what the result is built upon."""
    assert content_inputs(op) == expected


# -- images by what they are now --------------------------------------------------------------------------------------

PINNED = ImageOp(reference=f"docker.io/library/debian:12@{OTHER}")


def test_pinning_an_image_renames_all_that_is_built_upon_it():
    """Other digests from it up, under the same names and as the same targets; what is beside it stays as it is."""
    copy = Vertex(FileOp(actions=(CopyAction(input=1, sources=("/",), destination="/"),)), (RUN.digest, LOCAL.digest))
    vertices = {vertex.digest: vertex for vertex in (BASE, LOCAL, RUN, copy)}
    names = {BASE.digest: "base", LOCAL.digest: "sources", copy.digest: "copy"}
    new = pinned(Definition(vertices, (copy.digest, LOCAL.digest), names), {BASE.op: PINNED})

    assert [new.vertices[digest].op for digest in new.order] == [PINNED, MAKE, LOCAL.op, copy.op]
    assert [new.name(digest) for digest in new.targets] == ["copy", "sources"]
    assert new.targets[1] == LOCAL.digest
    assert not new.vertices.keys() & {BASE.digest, RUN.digest, copy.digest}
    assert new.name(Vertex(PINNED).digest) == "base"


def test_nothing_to_pin_changes_nothing():
    """No image, or none of those: the definition and its digests are what they were."""
    definition = Definition({BASE.digest: BASE, RUN.digest: RUN}, (RUN.digest,))
    assert pinned(definition, {}) is definition
    assert pinned(definition, {PINNED: BASE.op}) == definition


def test_scratch_stays_scratch():
    """There is nothing below to be renamed."""
    made = Vertex(FileOp(actions=(MakeFile(path="/a", data=b""),)), (None,))
    both = Vertex(MergeOp(), (BASE.digest, made.digest))
    definition = Definition({v.digest: v for v in (BASE, made, both)}, (both.digest,))
    new = pinned(definition, {BASE.op: PINNED})
    assert new.vertices[made.digest] == made
    assert new.vertices[new.targets[0]].inputs == (Vertex(PINNED).digest, made.digest)


def test_images_that_are_one_when_pinned_are_one_vertex():
    """Two tags of one image: what is the same upon both is done once, and both targets are that."""
    tag = Vertex(ImageOp(reference="docker.io/library/debian:bookworm"))
    runs = [Vertex(MAKE, (image.digest,)) for image in (BASE, tag)]
    definition = Definition({v.digest: v for v in (BASE, tag, *runs)}, tuple(run.digest for run in runs))
    new = pinned(definition, {BASE.op: PINNED, tag.op: PINNED})
    assert len(new.vertices) == 2
    assert new.targets[0] == new.targets[1]
    assert decode_definition(encode_definition(new)) == new


def test_registries_are_those_of_images():
    """Each host once, as it is asked; a graph without images asks none."""
    images = [
        Vertex(ImageOp(reference=reference))
        for reference in ("docker.io/library/debian:12", "127.0.0.1:5000/a:1", "127.0.0.1:5000/b:1")
    ]
    top = Vertex(MergeOp(), tuple(image.digest for image in images))
    definition = Definition({v.digest: v for v in (*images, top)}, (top.digest,))
    assert image_registries(definition) == {parse_reference("debian").host, "127.0.0.1:5000"}
    assert image_registries(Definition({LOCAL.digest: LOCAL}, (LOCAL.digest,))) == frozenset()
