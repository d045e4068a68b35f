"""Errors say what to do next."""

import pytest

from cluster import errors
from cluster.digest import digest_of
from cluster.errors import (
    BlobNotFoundError,
    ContentError,
    CredentialFileError,
    CredentialHelperError,
    OtherDigestError,
    RegistryError,
)

#: Answered within the farm: no user meets them.
_INTERNAL = {errors.ChallengedError, errors.RangeRefusedError}


def below(base):
    """Return every class below *base*."""
    return [cls for sub in base.__subclasses__() for cls in (sub, *below(sub)) if sub not in _INTERNAL]


@pytest.mark.parametrize("cls", [*below(ContentError), *below(RegistryError)], ids=lambda cls: cls.__name__)
def test_what_is_wrong_with_bytes_or_a_registry_comes_with_a_hint(cls):
    """Who meets it is told what to do, not only what is."""
    fields = cls.__init__.__code__.co_argcount - 1
    assert cls(*["x"] * fields).hint


def test_a_foreign_layers_hint_speaks_of_its_address():
    """It is in no repository that one could push it to."""
    assert "foreign layer" in BlobNotFoundError("sha256:x", "https://elsewhere.example/blob").hint


def test_credentials_are_repaired_where_they_are_kept():
    """Neither a file of credentials nor a helper is a matter of the farm's configuration."""
    of_file = CredentialFileError("/home/me/.docker/config.json", ("it is not JSON",))
    assert str(of_file) == "credentials file /home/me/.docker/config.json: it is not JSON"
    assert "docker login" in of_file.hint
    assert "default.toml" not in of_file.hint
    assert "`docker-credential-pass get`" in CredentialHelperError("pass", "r.example", "exit status 1").hint


def test_a_digest_to_push_to_is_told_as_it_is_written():
    """The hint is a target that would do."""
    wanted, actual = digest_of(b"other"), digest_of(b"this")
    error = OtherDigestError(f"r.example/app:1@{wanted}", actual)
    assert f"r.example/app:1@{wanted} names another image" in str(error)
    assert error.hint.endswith(f"or to r.example/app:1@{actual}")
