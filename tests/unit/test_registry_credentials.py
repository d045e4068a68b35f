"""Credentials: docker's and podman's files and helpers, found and never shown."""

from __future__ import annotations

import base64
import json
import os

import pytest

from cluster.errors import CredentialFileError, CredentialHelperError
from storage.registry.credentials import Credential, CredentialSource, hostname

SECRET = "open-sesame"


def auth(user, password):
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def write(tmp_path):
    """Write a config.json and return a source that reads it."""

    def build(document, **more):
        file = tmp_path / "config.json"
        file.write_text(document if isinstance(document, str) else json.dumps(document))
        return CredentialSource(files=[file], **more)

    return build


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Install ``docker-credential-test`` with the given shell script."""

    def build(script):
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        file = directory / "docker-credential-test"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (auth("alice", SECRET), Credential(username="alice", secret=SECRET)),
        (auth("alice", "a:b"), Credential(username="alice", secret="a:b")),
        ({"username": "alice", "password": SECRET}, Credential(username="alice", secret=SECRET)),
        (
            {**auth("alice", ""), "identitytoken": SECRET},
            Credential(username="alice", identity_token=SECRET),
        ),
        ({}, None),
        (auth("", ""), None),
    ],
)
def test_entries_of_auths(write, entry, expected):
    """``auth``, user and password, or an identity token."""
    assert write({"auths": {"r.example": entry}}).lookup("r.example") == expected


@pytest.mark.parametrize(
    "key", ["r.example:5000", "https://r.example:5000", "https://r.example:5000/v1/", "R.example:5000/v2/"]
)
def test_keys_of_auths_are_hosts_in_any_dress(write, key):
    """Scheme and path don't matter, the port does."""
    source = write({"auths": {key: auth("alice", SECRET)}})
    assert source.lookup("r.example:5000").username == "alice"
    assert source.lookup("r.example") is None


def test_docker_hub_has_many_names(write):
    """All of them mean https://index.docker.io/v1/."""
    source = write({"auths": {"https://index.docker.io/v1/": auth("alice", SECRET)}})
    for name in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        assert source.lookup(name).username == "alice"
        assert hostname(name) == "docker.io"


def test_given_credentials_come_first(write, tmp_path):
    """What a caller passes wins over every file."""
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"docker.io": auth("file", SECRET)}}))
    source = CredentialSource({"docker.io": ("given", SECRET)}, files=[tmp_path / "config.json"])
    assert source.lookup("registry-1.docker.io").username == "given"


def test_files_are_found_as_docker_and_podman_do(tmp_path):
    """REGISTRY_AUTH_FILE alone; else DOCKER_CONFIG, or the home, and podman's runtime file."""
    for place, user in (("docker", "d"), ("home/.docker", "h"), ("run/containers", "p"), ("own", "o")):
        (tmp_path / place).mkdir(parents=True)
        name = "auth.json" if user in "po" else "config.json"
        (tmp_path / place / name).write_text(json.dumps({"auths": {"r.example": auth(user, SECRET)}}))

    def user(**environ):
        found = CredentialSource.from_environment({key: str(tmp_path / value) for key, value in environ.items()})
        credential = found.lookup("r.example")
        return credential and credential.username

    assert user(HOME="home") == "h"
    assert user(HOME="home", DOCKER_CONFIG="docker") == "d"
    assert user(HOME="nowhere", XDG_RUNTIME_DIR="run") == "p"
    assert user(HOME="home", REGISTRY_AUTH_FILE="own/auth.json") == "o"
    assert user(HOME="nowhere") is None


def test_a_helper_is_asked_by_dockers_protocol(write, helper):
    """The server's name on its standard input; JSON on its output."""
    helper(
        f"""read -r server; printf '{{"ServerURL":"%s","Username":"%s","Secret":"{SECRET}"}}' "$server" "$server\""""
    )
    assert write({"credHelpers": {"r.example": "test"}}).lookup("r.example").username == "r.example"
    hub = write({"credsStore": "test"}).lookup("registry-1.docker.io")
    assert hub.username == "https://index.docker.io/v1/"


def test_a_helper_may_hold_an_identity_token(write, helper):
    """The user ``<token>`` marks it."""
    helper(f"""echo '{{"Username":"<token>","Secret":"{SECRET}"}}'""")
    assert write({"credsStore": "test"}).lookup("r.example") == Credential(identity_token=SECRET)


def test_a_helper_that_has_none_leaves_it_to_auths(write, helper):
    """An answer that says so is no error."""
    helper("echo 'credentials not found in native keychain'; exit 1")
    source = write({"credsStore": "test", "auths": {"r.example": auth("alice", SECRET)}})
    assert source.lookup("r.example").username == "alice"
    assert source.lookup("s.example") is None


@pytest.mark.parametrize(
    "script",
    [
        f"echo {SECRET}; exit 3",
        f"echo {SECRET}",
        f"echo '[\"{SECRET}\"]'",
        f'echo \'{{"Username":1,"Secret":"{SECRET}"}}\'',
    ],
)
def test_what_a_broken_helper_prints_is_never_repeated(write, helper, script):
    """The error names the helper and the registry, and nothing of its output is in it or behind it."""
    helper(script)
    with pytest.raises(CredentialHelperError) as caught:
        write({"credHelpers": {"r.example": "test"}}).lookup("r.example")
    assert SECRET not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
    assert "r.example" in str(caught.value)


def test_a_helper_has_a_deadline(write, helper):
    """One that hangs is ended."""
    helper(f"echo {SECRET}; exec sleep 60")
    with pytest.raises(CredentialHelperError, match=r"no answer in 0\.2 s") as caught:
        write({"credHelpers": {"r.example": "test"}}, helper_timeout_s=0.2).lookup("r.example")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["../evil", "a b", "missing-one", ""])
def test_a_helper_that_is_none_is_an_error(write, name):
    """A name is looked up in PATH only, and is never a path."""
    with pytest.raises(CredentialHelperError):
        write({"credHelpers": {"r.example": name}}).lookup("r.example")


@pytest.mark.parametrize("text", [f"{{{SECRET}", "[]", json.dumps({"auths": {"r.example": {"auth": SECRET}}})])
def test_a_broken_file_is_named_and_not_quoted(write, text):
    """The error names the file; its contents stay where they are."""
    with pytest.raises(CredentialFileError, match=r"config\.json") as caught:
        write(text).lookup("r.example")
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_what_was_found_is_kept_and_forgotten(write, tmp_path):
    """For five minutes, or until it was refused."""
    now = [0.0]
    source = write({"auths": {"r.example": auth("one", SECRET)}}, clock=lambda: now[0])
    assert source.lookup("r.example").username == "one"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"r.example": auth("two", SECRET)}}))
    assert source.lookup("r.example").username == "one"
    source.forget("r.example")
    assert source.lookup("r.example").username == "two"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"r.example": auth("three", SECRET)}}))
    now[0] = 301.0
    assert source.lookup("r.example").username == "three"


def test_nothing_shows_a_secret(write):
    """Neither a credential's repr nor a source's."""
    source = write({"auths": {"r.example": auth("alice", SECRET)}})
    assert SECRET not in f"{source!r} {source.lookup('r.example')!r} {CredentialSource({'a': ('b', SECRET)})!r}"
