"""The options of ``lazyfarm build``: docker's and buildx's forms, and what is wrong with others."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidArgumentError, InvalidOutputError, InvalidReferenceError
from lazyfarm.cli.build_args import build_args, labels, outputs, secrets


def test_build_args_are_given_or_from_the_environment():
    """A name alone that the environment doesn't have is as if it had not been given; the last one counts."""
    given = build_args(["A=1", "B", "C", "D=", "E=x=y", "A=2"], {"B": "of the environment"})
    assert given == {"A": "2", "B": "of the environment", "D": "", "E": "x=y"}


@pytest.mark.parametrize("read", [lambda texts: build_args(texts, {}), labels])
@pytest.mark.parametrize("text", ["", "=x", " =x"])
def test_a_name_that_is_empty_is_refused(read, text):
    """It could only be a slip."""
    with pytest.raises(InvalidArgumentError):
        read([text])


def test_labels_may_be_empty():
    """As docker's."""
    assert labels(["a=b=c", "d", "e="]) == {"a": "b=c", "d": "", "e": ""}


def test_secrets_are_values_or_files_that_are_there(tmp_path, monkeypatch):
    """Of the environment, of a file, or, by ID alone, of whichever has it; a path with commas in CSV's quotes."""
    monkeypatch.chdir(tmp_path)
    for name in ("token", "a,b", "both"):
        (tmp_path / name).write_text("x")
    environ = {"TOKEN": "t\udcff", "both": "of the environment"}
    texts = [
        "id=a,env=TOKEN",
        "id=b,src=token",
        '"id=c","src=a,b"',
        "id=token",
        "id=both",
        "type=file,id=d,source=both",
    ]
    assert secrets(texts, environ) == {
        "a": b"t\xff",
        "b": tmp_path / "token",
        "c": tmp_path / "a,b",
        "token": tmp_path / "token",
        "both": b"of the environment",
        "d": tmp_path / "both",
    }
    assert secrets(["type=env,id=e,src=TOKEN"], {"TOKEN": "t"}) == {"e": b"t"}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["src=x"], "no id"),
        (["id=a,src=x,env=Y"], "id=ID"),
        (["id=a,type=vault"], "id=ID"),
        (["id=a,color=red"], "color is not supported"),
        (["id"], "is not KEY=VALUE"),
        (["id=a,env=NONE"], "the environment has no NONE"),
        (["id=nosuch"], "No such file"),
        (["id=a,env=Y", "id=a,env=Y"], "given twice"),
        (['"id=a'], "unexpected end"),
    ],
)
def test_secrets_that_cannot_be_meant_are_refused(texts, says, tmp_path, monkeypatch):
    """And no value is in the error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        secrets(texts, {"Y": "hunter2"})
    assert "hunter2" not in str(caught.value)


def names(references):
    return [reference.name for reference in references]


def test_push_is_of_every_name():
    """Normalised, each once."""
    found = outputs([], ["app", "docker.io/library/app:latest", "r.example/app:1"], push=True)
    assert names(found.tags) == names(found.pushes) == ["docker.io/library/app:latest", "r.example/app:1"]


def test_outputs_are_in_the_farms_form_or_in_buildxs(tmp_path, monkeypatch):
    """Directories and files of this machine, and names."""
    monkeypatch.chdir(tmp_path)
    texts = [
        "oci:a",
        "oci-archive:/b",
        "local:c",
        "d",
        "type=local,dest=e",
        "type=oci,dest=f",
        "type=oci,dest=g,tar=false",
    ]
    found = outputs(texts, [], push=False)
    here = str(tmp_path)
    assert tuple(map(str, found.exports)) == (
        f"oci:{here}/a",
        "oci-archive:/b",
        f"local:{here}/c",
        f"local:{here}/d",
        f"local:{here}/e",
        f"oci-archive:{here}/f",
        f"oci:{here}/g",
    )
    assert (found.tags, found.pushes) == ((), ())


@pytest.mark.parametrize(
    ("output", "tags", "pushed"),
    [
        ("type=registry", ["r.example/a:1"], ["r.example/a:1"]),
        ("type=image,name=r.example/b:1,push=true", ["r.example/a:1"], ["r.example/b:1"]),
        ("type=image,name=r.example/b:1", ["r.example/a:1"], []),
        ('type=registry,"name=r.example/b:1,r.example/c:1"', [], ["r.example/b:1", "r.example/c:1"]),
    ],
)
def test_names_in_an_output_are_names_of_the_image(output, tags, pushed):
    """And only what is to be pushed is."""
    found = outputs([output], tags, push=False)
    assert names(found.pushes) == pushed
    assert set(pushed) | set(tags) <= set(names(found.tags))


@pytest.mark.parametrize(
    "output", ["type=docker,dest=x", "dest=x", "type=local", "", "oci:", "type=oci,dest=x,tar=maybe"]
)
def test_outputs_that_cannot_be_meant_are_refused(output):
    """As :func:`lazyfarm.outputs.parse_output` does."""
    with pytest.raises(InvalidOutputError):
        outputs([output], [], push=False)


def test_one_output_alone_goes_to_standard_output():
    """Two archives in one stream are none."""
    with pytest.raises(InvalidArgumentError, match="one alone"):
        outputs(["-", "type=oci"], [], push=False)


def test_a_push_needs_a_name():
    """There is nowhere to push to."""
    with pytest.raises(InvalidArgumentError, match="--tag"):
        outputs([], [], push=True)


@pytest.mark.parametrize("tag", ["Upper", "r.example/a@sha256:" + "a" * 64])
def test_a_name_is_a_tag(tag):
    """What is built has a digest of its own."""
    with pytest.raises(InvalidReferenceError):
        outputs([], [tag], push=False)
