"""Image references and platforms, as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.digest import Digest, is_digest
from cluster.errors import InvalidPlatformError, InvalidReferenceError
from cluster.provider import ProviderHandle

#: The registry that a reference without a host means, and the host that serves it.
DOCKER_HUB = "docker.io"
DOCKER_HUB_HOST = "registry-1.docker.io"
_DOCKER_HUB_NAMES = frozenset({DOCKER_HUB, "index.docker.io", DOCKER_HUB_HOST})

# The grammar of github.com/distribution/reference (regexp.go).
_DOMAIN_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_DOMAIN_COMPONENT}(?:\.{_DOMAIN_COMPONENT})*|\[[a-fA-F0-9:]+\])(?P<port>:[0-9]{{1,5}})?\Z")
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_IMAGE_ID = re.compile(r"[a-f0-9]{64}\Z")
_MAX_REPOSITORY_CHARS = 255
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReference:
    """An image by name: normalised, so that two spellings of one image are equal."""

    #: ``docker.io`` or the registry's host and port; what people write.
    registry: str
    #: Repository within it, e.g. ``library/debian``.
    repository: str
    #: None only where there is a digest.
    tag: str | None
    #: Where both are given, the digest decides and the tag is a label.
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """Return the normalised reference, e.g. ``docker.io/library/debian:12``."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def host(self) -> str:
        """Return the host that serves the registry: ``registry-1.docker.io`` for ``docker.io``."""
        return DOCKER_HUB_HOST if self.registry == DOCKER_HUB else self.registry

    @property
    def source(self) -> str:
        """Return ``host/repository``, equal to the ``source`` of its provider handle."""
        return f"{self.host}/{self.repository}"

    @property
    def selector(self) -> str:
        """Return what the registry is asked for: the digest if there is one, else the tag."""
        return self.digest or self.tag or "latest"

    def handle(self, *, plain_http: bool = False) -> ProviderHandle:
        """Return the provider handle of its repository."""
        return ProviderHandle(registry=self.host, repository=self.repository, plain_http=plain_http)

    def __str__(self) -> str:
        return self.name


def parse_reference(text: str) -> ImageReference:
    """Parse ``[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`` by Docker's rules.

    What stands before the first slash is a host if it has a dot, a colon or an upper-case letter, or is
    ``localhost``; without a host it is Docker Hub, whose one-part names are under ``library/``. Without
    a tag and a digest the tag is ``latest``.

    Raises:
        InvalidReferenceError: with what is wrong.
    """
    if "://" in text:
        raise InvalidReferenceError(text, "it is an address; leave out the scheme")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise InvalidReferenceError(text, f"{digest!r} is not sha256: and 64 lower-case hexadecimal digits")
    host, path = _split_host(rest)
    repository, tag = _split_tag(path)
    _check_host(text, host)
    _check_repository(text, repository)
    if tag is not None and _TAG.match(tag) is None:
        raise InvalidReferenceError(
            text, f"tag {tag!r} must be up to 128 letters, digits, '_', '.' and '-', and not start with '.' or '-'"
        )
    if host is None and _IMAGE_ID.match(repository):
        raise InvalidReferenceError(text, "64 hexadecimal digits would be taken for an image ID")
    registry = DOCKER_HUB if host is None or host in _DOCKER_HUB_NAMES else host
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if len(repository) > _MAX_REPOSITORY_CHARS:
        raise InvalidReferenceError(text, f"the repository has more than {_MAX_REPOSITORY_CHARS} characters")
    return ImageReference(
        registry=registry,
        repository=repository,
        tag=tag if tag is not None or at else "latest",
        digest=Digest(digest) if at else None,
    )


def _split_host(text: str) -> tuple[str | None, str]:
    first, slash, rest = text.partition("/")
    is_host = slash and (first == "localhost" or "." in first or ":" in first or first != first.lower())
    return (first, rest) if is_host else (None, text)


def _split_tag(path: str) -> tuple[str, str | None]:
    repository, colon, tag = path.rpartition(":")
    # A colon before the last slash is no tag: the repository's own check refuses it.
    return (repository, tag) if colon and "/" not in tag else (path, None)


def _check_host(text: str, host: str | None) -> None:
    if host is None:
        return
    found = _HOST.match(host)
    if found is None or int((found["port"] or ":0")[1:]) > _MAX_PORT:
        raise InvalidReferenceError(text, f"{host!r} is no host name with an optional port")


def _check_repository(text: str, repository: str) -> None:
    if not repository:
        raise InvalidReferenceError(text, "it has no repository")
    if repository != repository.lower():
        raise InvalidReferenceError(text, "the repository must be in lower case")
    if _REPOSITORY.match(repository) is None:
        raise InvalidReferenceError(
            text,
            f"repository {repository!r} must be lower-case letters and digits joined by '/', '.', '_', '__' or '-'",
        )


# -- platforms ----------------------------------------------------------------------------------------


_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "armhf": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
}
_WORD = re.compile(r"[A-Za-z0-9_.-]+\Z")
#: The variants that a machine of the first one can also run, best first (containerd platforms, compare.go).
_RUNS_ALSO = {
    "arm": ("v8", "v7", "v6", "v5"),
    "arm64": ("v9", ""),
    "amd64": ("v4", "v3", "v2", ""),
}
_OS_ARCH, _OS_ARCH_VARIANT = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Platform:
    """What an image runs on; normalised, so ``linux/arm64/v8`` and ``linux/aarch64`` are equal."""

    os: str
    architecture: str
    #: ``v7``, say; empty for the architecture's baseline.
    variant: str = ""

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """Normalise the three words as containerd's platforms package does."""
        os, architecture, variant = os.lower(), architecture.lower(), variant.lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = variant or implied
        if variant.isdecimal():
            variant = f"v{variant}"
        baseline = {("arm64", "v8"), ("amd64", "v1")}
        if (architecture, variant) in baseline:
            variant = ""
        if architecture == "arm" and not variant:
            variant = "v7"
        return cls(os="darwin" if os == "macos" else os, architecture=architecture, variant=variant)

    @property
    def also_runs(self) -> tuple[Platform, ...]:
        """Return the platforms whose images run here, itself first, then ever older variants."""
        ladder = _RUNS_ALSO.get(self.architecture, ())
        older = ladder[ladder.index(self.variant) + 1 :] if self.variant in ladder else ()
        return (self, *(Platform(os=self.os, architecture=self.architecture, variant=variant) for variant in older))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def parse_platform(text: str) -> Platform:
    """Parse ``os/architecture[/variant]``.

    Raises:
        InvalidPlatformError: it is not of that form.
    """
    parts = text.split("/")
    if len(parts) not in (_OS_ARCH, _OS_ARCH_VARIANT) or not all(_WORD.match(part) for part in parts):
        raise InvalidPlatformError(text)
    return Platform.of(*parts)


def default_platform(machine: str) -> Platform:
    """Return the Linux platform of a machine, named as ``platform.machine()`` does (``x86_64``)."""
    return Platform.of("linux", machine)
