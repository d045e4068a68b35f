"""``--output``: what BuildKit's users write means what they mean; what can't be meant says so."""

import pytest

from cluster.errors import InvalidOutputError, InvalidReferenceError
from lazyfarm.outputs import STDOUT, Output, OutputKind, parse_output

APP, OTHER = "docker.io/library/app:1", "r.example:5000/team/app:latest"


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("out", Output(kind=OutputKind.LOCAL, dest="out")),
        (".", Output(kind=OutputKind.LOCAL, dest=".")),
        ("./a=b", Output(kind=OutputKind.LOCAL, dest="./a=b")),
        ("-", Output(kind=OutputKind.TAR, dest=STDOUT)),
        ("oci:dir", Output(kind=OutputKind.OCI_LAYOUT, dest="dir")),
        ("oci-archive:a.tar", Output(kind=OutputKind.OCI_ARCHIVE, dest="a.tar")),
        ("local:dir", Output(kind=OutputKind.LOCAL, dest="dir")),
        ("type=local,dest=out", Output(kind=OutputKind.LOCAL, dest="out")),
        ("type=tar,dest=out.tar", Output(kind=OutputKind.TAR, dest="out.tar")),
        ("type=tar", Output(kind=OutputKind.TAR, dest=STDOUT)),
        ("type=oci,dest=a.tar", Output(kind=OutputKind.OCI_ARCHIVE, dest="a.tar")),
        ("type=oci,dest=-", Output(kind=OutputKind.OCI_ARCHIVE, dest=STDOUT)),
        ("type=oci,dest=dir,tar=false,name=app:1", Output(kind=OutputKind.OCI_LAYOUT, dest="dir", names=(APP,))),
        ("TYPE=image,Name=app:1", Output(kind=OutputKind.IMAGE, names=(APP,))),
        ("type=image,name=app:1,push=true", Output(kind=OutputKind.IMAGE, names=(APP,), push=True)),
        ("type=registry,name=app:1", Output(kind=OutputKind.IMAGE, names=(APP,), push=True)),
        ("type=registry,name=app:1,push=0", Output(kind=OutputKind.IMAGE, names=(APP,))),
        (
            'type=image,"name=app:1, r.example:5000/team/app",push=1',
            Output(kind=OutputKind.IMAGE, names=(APP, OTHER), push=True),
        ),
        ("type=registry", Output(kind=OutputKind.IMAGE, push=True)),
        ('type=local,"dest=a,b"', Output(kind=OutputKind.LOCAL, dest="a,b")),
    ],
)
def test_outputs_parse(text, output):
    """The long form and the short ones, as values."""
    assert parse_output(text) == output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("dest=out", "lacks a type"),
        ("type=,dest=out", "lacks a type"),
        ("type=docker,dest=out", "no type docker"),
        ("type=local", "needs a directory"),
        ("type=local,dest=-", "needs a directory"),
        ("oci:", "needs a directory"),
        ("type=oci,tar=false", "needs a directory"),
        ("type=local,dest=a,dest=b", "dest twice"),
        ("type=local,out", "not KEY=VALUE"),
        ("type=local,dest=a,mode=0755", "takes no mode, only dest"),
        ("type=image,push=maybe", "true or false"),
        ('type=local,"dest=a', "CSV"),
    ],
)
def test_what_says_no_destination_is_refused(text, reason):
    """With what is wrong, before anything is built."""
    with pytest.raises(InvalidOutputError, match=reason) as caught:
        parse_output(text)
    assert caught.value.text == text
    assert "type=" in caught.value.hint


def test_a_name_is_an_image_reference():
    """Found out here, not when the build is done."""
    with pytest.raises(InvalidReferenceError):
        parse_output("type=image,name=Not A Name")
