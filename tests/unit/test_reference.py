"""Image references and platforms: Docker's and containerd's rules."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidPlatformError, InvalidReferenceError
from cluster.reference import Platform, default_platform, parse_platform, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("library/debian:12", "docker.io/library/debian:12"),
        ("docker.io/debian:12", "docker.io/library/debian:12"),
        ("index.docker.io/debian", "docker.io/library/debian:latest"),
        ("registry-1.docker.io/library/debian", "docker.io/library/debian:latest"),
        ("someone/app", "docker.io/someone/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("host:5000/app:1", "host:5000/app:1"),
        ("127.0.0.1:5000/a/b/c:1.2-3_4", "127.0.0.1:5000/a/b/c:1.2-3_4"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("[2001:db8::1]/app:1", "[2001:db8::1]/app:1"),
        ("quay.io/a__b/c--d.e:T", "quay.io/a__b/c--d.e:T"),
        ("Host/app", "Host/app:latest"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}"),
        (f"debian:12@{DIGEST}", f"docker.io/library/debian:12@{DIGEST}"),
        (f"host:1/debian@{DIGEST}", f"host:1/debian@{DIGEST}"),
        ("app:" + "t" * 128, "docker.io/library/app:" + "t" * 128),
        ("quay.io/" + "a" * 255, "quay.io/" + "a" * 255 + ":latest"),
    ],
)
def test_a_reference_is_normalised(text, name):
    """Two spellings of one image have one name, and a name parses to itself."""
    assert parse_reference(text).name == name
    assert parse_reference(name).name == name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no repository"),
        (":tag", "no repository"),
        ("host:5000/", "no repository"),
        ("Debian", "lower case"),
        ("quay.io/Team/app", "lower case"),
        ("https://quay.io/app", "scheme"),
        ("app:", "tag"),
        ("app:-x", "tag"),
        ("app:" + "t" * 129, "tag"),
        ("app:a b", "tag"),
        ("app:1\n", "tag"),
        ("app@sha256:abc", "sha256"),
        (f"app@{DIGEST.upper()}", "sha256"),
        ("app@", "sha256"),
        ("a..b", "repository"),
        ("a/./b", "repository"),
        ("a//b", "repository"),
        ("-a", "repository"),
        ("a_", "repository"),
        ("a b", "repository"),
        ("../etc/passwd", "host name"),
        ("a/../b", "repository"),
        ("host:port/app", "host name"),
        ("host:99999/app", "host name"),
        ("[::1/app", "host name"),
        ("-host.example/app", "host name"),
        ("user@host/app", "sha256"),
        ("quay.io/" + "a" * 256, "255"),
        ("a" * 250, "255"),
        ("0123456789abcdef" * 4, "image ID"),
    ],
)
def test_what_docker_refuses_is_refused_with_a_reason(text, reason):
    """Nothing that could leave its place in a URL or a path gets through."""
    with pytest.raises(InvalidReferenceError, match=reason):
        parse_reference(text)


def test_docker_hub_is_served_by_another_host():
    """The name says docker.io, the provider handle says who serves it, and the sources agree."""
    reference = parse_reference("debian:12")
    assert (reference.registry, reference.host) == ("docker.io", "registry-1.docker.io")
    assert reference.handle().registry == "registry-1.docker.io"
    assert reference.source == reference.handle().source == "registry-1.docker.io/library/debian"
    assert parse_reference("quay.io/a").handle(plain_http=True).plain_http


def test_a_digest_decides_over_a_tag():
    """What is asked of the registry is the digest where there is one."""
    assert parse_reference(f"a:1@{DIGEST}").selector == DIGEST
    assert parse_reference("a:1").selector == "1"
    assert parse_reference(f"a@{DIGEST}").tag is None


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/i686", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
        ("linux/riscv64", "linux/riscv64"),
    ],
)
def test_a_platform_is_normalised(text, normalised):
    """Two spellings of one platform are equal."""
    assert str(parse_platform(text)) == normalised
    assert parse_platform(normalised) == parse_platform(text)


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "linux/amd64/v3/x", "linux/a b", "linux//v7"])
def test_what_is_no_platform_is_refused(text):
    """Operating system and architecture are both needed."""
    with pytest.raises(InvalidPlatformError):
        parse_platform(text)


def test_newer_variants_run_older_ones():
    """Best first, within one architecture; a baseline runs only itself."""
    assert [str(one) for one in parse_platform("linux/arm/v7").also_runs] == [
        "linux/arm/v7",
        "linux/arm/v6",
        "linux/arm/v5",
    ]
    assert [str(one) for one in parse_platform("linux/amd64/v3").also_runs] == [
        "linux/amd64/v3",
        "linux/amd64/v2",
        "linux/amd64",
    ]
    assert parse_platform("linux/amd64").also_runs == (parse_platform("linux/amd64"),)
    assert parse_platform("linux/mips/odd").also_runs == (Platform(os="linux", architecture="mips", variant="odd"),)


def test_the_default_is_this_machines():
    """As ``platform.machine()`` names it."""
    assert str(default_platform("x86_64")) == "linux/amd64"
    assert str(default_platform("aarch64")) == "linux/arm64"
    assert str(default_platform("armv7l")) == "linux/arm/v7"
