"""A real ``docker-registry`` on a free port, images made in memory for it, and its access log."""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import http.client
import io
import json
import random
import re
import shutil
import signal
import ssl
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
import zstandard

from cluster.descriptor import CONFIG_DOCKER, CONFIG_OCI, INDEX_DOCKER, INDEX_OCI, MANIFEST_DOCKER, MANIFEST_OCI
from cluster.digest import Digest, digest_of

BINARY = "docker-registry"
#: The one user of :func:`htpasswd_config`.
HTPASSWD_USER, HTPASSWD_PASSWORD = "alice", "wonderland"
_HTPASSWD_LINE = "alice:$2b$04$AtTubUmORZvl690NjCvzpeGvTtJFJZ1soUdLd4Ysdodff2ciel5ju\n"
_START_TIMEOUT_S = 20.0
_LISTENING = re.compile(r'msg="listening on ([^" ]+?)(?:, tls)?"')
_ACCESS = re.compile(r'\S+ - \S+ \[[^]]*\] "(\S+) (\S+) HTTP/[0-9.]+" (\d+) (\d+)')

Kind = Literal["manifest", "blob", "upload", "base", "other"]


# -- the server ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One line of the access log."""

    method: str
    path: str
    status: int
    #: Bytes of the answer's body.
    size_bytes: int

    @property
    def kind(self) -> Kind:
        """What was asked for."""
        if "/blobs/uploads" in self.path:
            return "upload"
        if "/blobs/" in self.path:
            return "blob"
        if "/manifests/" in self.path:
            return "manifest"
        return "base" if self.path.partition("?")[0] in ("/v2/", "/v2") else "other"


@dataclass
class Registry:
    """A running registry."""

    host: str
    directory: Path
    tls: ssl.SSLContext | None = None
    #: Scope to Authorization header, for :meth:`call`; None where it asks for none.
    authorize: Callable[[str], str] | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _seen: int = field(default=0, repr=False)

    def start(self) -> None:
        """Start it, with its blobs, at the address that it had before."""
        file = self.directory / "config.yml"
        if self.host:
            document = json.loads(file.read_text())
            document["http"]["addr"] = self.host
            file.write_text(json.dumps(document))
        with (self.directory / "access.log").open("ab") as access, (self.directory / "server.log").open("wb") as server:
            self.process = subprocess.Popen([BINARY, "serve", str(file)], stdout=access, stderr=server)
        self.host = _await_start(self.process, self.directory / "server.log")

    def stop(self, by: signal.Signals = signal.SIGKILL) -> None:
        """End it by that signal."""
        if self.process is not None:
            self.process.send_signal(by)
            self.process.wait()

    @property
    def url(self) -> str:
        """Return ``http[s]://HOST:PORT``."""
        return f"{'https' if self.tls else 'http'}://{self.host}"

    def call(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, repository: str = ""
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Make one request, as who may do everything."""
        port = urlsplit(self.url).port
        if self.tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        else:
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=self.tls)
        sent = dict(headers or {})
        if self.authorize is not None:
            sent["Authorization"] = self.authorize(f"repository:{repository}:pull,push" if repository else "")
        try:
            connection.request(method, path, body=body, headers=sent)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def push_blob(self, repository: str, data: bytes) -> Digest:
        """Upload a blob."""
        digest = digest_of(data)
        status, headers, body = self.call("POST", f"/v2/{repository}/blobs/uploads/", repository=repository)
        assert status == 202, body
        location = urlsplit(headers["Location"])
        path = f"{location.path}?{location.query}{'&' if location.query else ''}digest={digest}"
        kind = {"Content-Type": "application/octet-stream"}
        status, _, body = self.call("PUT", path, data, kind, repository=repository)
        assert status == 201, body
        return digest

    def push_manifest(self, repository: str, selector: str, media_type: str, data: bytes) -> Digest:
        """Put a manifest under a tag or digest."""
        path = f"/v2/{repository}/manifests/{selector}"
        status, _, body = self.call("PUT", path, data, {"Content-Type": media_type}, repository=repository)
        assert status == 201, body
        return digest_of(data)

    def push(self, repository: str, tag: str, image: Image | Index) -> Digest:
        """Push an image, or an index and its images; return the digest of what the tag names."""
        if isinstance(image, Index):
            for one in image.images.values():
                self._push_one(repository, digest_of(one.manifest), one)
            return self.push_manifest(repository, tag, image.media_type, image.data)
        return self._push_one(repository, tag, image)

    def _push_one(self, repository: str, selector: str, image: Image) -> Digest:
        for layer in image.layers:
            if not layer.urls:
                self.push_blob(repository, layer.data)
        self.push_blob(repository, image.config)
        return self.push_manifest(repository, selector, image.media_type, image.manifest)

    # -- the access log ---------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        """Return what was asked of it since :meth:`forget`, all that was answered before this call."""
        return self._read()[self._seen :]

    def forget(self) -> None:
        """Begin counting anew."""
        self._seen = len(self._read())

    def count(self, method: str, kind: Kind, status: int | None = None) -> int:
        """Count the requests of a kind since :meth:`forget`."""
        return sum(
            1
            for request in self.requests()
            if (request.method, request.kind) == (method, kind) and status in (None, request.status)
        )

    def _read(self) -> list[Request]:
        # A line is written after its answer was sent: what was answered before this marker is there with it.
        marker = uuid.uuid4().hex
        self.call("GET", f"/v2/?marker={marker}")
        deadline = time.monotonic() + 10
        while True:
            text = (self.directory / "access.log").read_text()
            if marker in text:
                break
            assert time.monotonic() < deadline, "the access log doesn't show a request"
            time.sleep(0.005)
        found = [Request(m[1], m[2], int(m[3]), int(m[4])) for m in _ACCESS.finditer(text)]
        return [request for request in found if "?marker=" not in request.path]


@contextlib.contextmanager
def docker_registry(
    config: Mapping[str, Any] | None = None,
    *,
    storage: Path | None = None,
    tls: ssl.SSLContext | None = None,
    authorize: Callable[[str], str] | None = None,
) -> Iterator[Registry]:
    """Run a registry.

    Args:
        config: Sections of its configuration, merged over the defaults: ``{"auth": {...}}``.
        storage: Directory of its blobs, to share it with another registry; its own if None.
        tls: How to reach it, where *config* gives it a certificate.
        authorize: What to send with each request that the double itself makes, by scope.
    """
    directory = Path(tempfile.mkdtemp(prefix="registry-"))
    try:
        document: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {
                "filesystem": {"rootdirectory": str(storage or directory / "storage")},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            # Without it foreign layers are refused.
            "validation": {"manifests": {"urls": {"allow": ["^https?://"]}}},
        }
        document.update(config or {})
        # Port 0: the kernel chooses, and the log says which.
        document["http"] = {"addr": "127.0.0.1:0", "secret": "one-for-all", **document.get("http", {})}
        (directory / "config.yml").write_text(json.dumps(document))  # YAML takes JSON.
        registry = Registry("", directory, tls, authorize)
        try:
            registry.start()
            yield registry
        finally:
            registry.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _await_start(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        text = log.read_text()
        if (found := _LISTENING.search(text)) is not None:
            return found[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{BINARY} did not start:\n{text}")
        time.sleep(0.01)


def htpasswd_config(directory: Path) -> dict[str, Any]:
    """Return the configuration of a registry with basic auth."""
    file = directory / "htpasswd"
    file.write_text(_HTPASSWD_LINE)
    return {"auth": {"htpasswd": {"realm": "basic-realm", "path": str(file)}}}


@pytest.fixture(scope="session")
def registry_server() -> Iterator[Registry]:
    """An open registry for the whole session: tests use repositories of their own and ``forget()`` first."""
    if shutil.which(BINARY) is None:
        pytest.skip(f"{BINARY} is not installed")
    with docker_registry() as registry:
        yield registry


@pytest.fixture
def registry(registry_server: Registry) -> Registry:
    """The open registry, counting from now."""
    registry_server.forget()
    return registry_server


# -- certificates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """A certificate authority and a certificate that it signed for 127.0.0.1 and localhost, as PEM files."""

    ca_file: Path
    certificate: Path
    key: Path

    @property
    def context(self) -> ssl.SSLContext:
        """Return a client's context that trusts it."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    @property
    def registry_config(self) -> dict[str, Any]:
        """Return the configuration of a registry with that certificate."""
        return {"http": {"tls": {"certificate": str(self.certificate), "key": str(self.key)}}}


def make_authority(directory: Path, *, lasts: dt.timedelta = dt.timedelta(days=1)) -> Authority:
    """Make an authority and a server certificate, which end when *lasts* is over."""
    import ipaddress  # noqa: PLC0415 -- with cryptography: half a second that most tests don't need

    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    now = dt.datetime.now(dt.UTC)

    def certificate(name, key, issuer, issuer_key, *extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, now + lasts) - dt.timedelta(hours=1))
            .not_valid_after(now + lasts)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(issuer_key, hashes.SHA256())

    def name(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    ca = certificate(
        name("test authority"),
        ca_key,
        name("test authority"),
        ca_key,
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (usage, True),
        (x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False),
    )
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = certificate(
        name("localhost"),
        key,
        ca.subject,
        ca_key,
        (names, False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
    )
    authority = Authority(directory / "ca.pem", directory / "server.pem", directory / "server.key")
    authority.ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    authority.certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    authority.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A certificate authority of the test's own."""
    return make_authority(tmp_path)


# -- images -------------------------------------------------------------------------------------------------

_SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
LayerCompression = Literal["gzip", "zstd", "none"]


@dataclass(frozen=True)
class Layer:
    """A layer as stored."""

    media_type: str
    data: bytes = field(repr=False)
    diff_id: Digest
    urls: tuple[str, ...] = ()

    @property
    def digest(self) -> Digest:
        """Return its digest."""
        return digest_of(self.data)

    @property
    def descriptor(self) -> dict[str, Any]:
        """Return it as JSON."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data)}
        if self.urls:
            found["urls"] = list(self.urls)
        return found


@dataclass(frozen=True)
class Image:
    """An image as stored."""

    media_type: str
    manifest: bytes = field(repr=False)
    config: bytes = field(repr=False)
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> Digest:
        """Return its manifest's digest."""
        return digest_of(self.manifest)


@dataclass(frozen=True)
class Index:
    """An index as stored, by platform."""

    media_type: str
    data: bytes = field(repr=False)
    images: dict[str, Image]


def layer_tar(files: Mapping[str, bytes]) -> bytes:
    """Return a tar of regular files, the same for the same files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def build_layer(
    files: Mapping[str, bytes],
    *,
    compression: LayerCompression = "gzip",
    docker: bool = False,
    urls: Sequence[str] = (),
) -> Layer:
    """Make a layer of *files*; with *urls*, a foreign one that is not pushed."""
    tar = layer_tar(files)
    if compression == "gzip":
        data = gzip.compress(tar, compresslevel=1, mtime=0)
    elif compression == "zstd":
        data = zstandard.compress(tar)
    else:
        data = tar
    if docker:
        middle = "foreign.diff" if urls else "diff"
        suffix = _SUFFIX[compression].replace("+", ".")
        media_type = f"application/vnd.docker.image.rootfs.{middle}.tar{suffix}"
    else:
        middle = "nondistributable." if urls else ""
        media_type = f"application/vnd.oci.image.layer.{middle}v1.tar{_SUFFIX[compression]}"
    return Layer(media_type, data, digest_of(tar), tuple(urls))


def build_image(
    layers: Sequence[Layer], *, docker: bool = False, platform: str = "linux/amd64", label: str = ""
) -> Image:
    """Make an image of *layers*, lowest first; *label* makes it another image."""
    os, architecture, *variant = platform.split("/")
    config = json.dumps(
        {
            "os": os,
            "architecture": architecture,
            **({"variant": variant[0]} if variant else {}),
            "config": {"Labels": {"label": label}},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
    ).encode()
    media_type = MANIFEST_DOCKER if docker else MANIFEST_OCI
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {
                "mediaType": CONFIG_DOCKER if docker else CONFIG_OCI,
                "digest": digest_of(config),
                "size": len(config),
            },
            "layers": [layer.descriptor for layer in layers],
        }
    ).encode()
    return Image(media_type, manifest, config, tuple(layers))


def build_index(images: Mapping[str, Image], *, docker: bool = False) -> Index:
    """Make an index of images by platform."""
    media_type = INDEX_DOCKER if docker else INDEX_OCI
    entries = []
    for platform, image in images.items():
        os, architecture, *variant = platform.split("/")
        entries.append(
            {
                "mediaType": image.media_type,
                "digest": image.digest,
                "size": len(image.manifest),
                "platform": {
                    "os": os,
                    "architecture": architecture,
                    **({"variant": variant[0]} if variant else {}),
                },
            }
        )
    data = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()
    return Index(media_type, data, dict(images))


def random_image(seed: int, *, layers: int = 3, layer_bytes: int = 20_000, docker: bool = False) -> Image:
    """Make an image of layers of incompressible bytes, the same for the same arguments."""
    dice = random.Random(seed)  # noqa: S311 -- reproducible bytes, not secrets
    return build_image(
        [build_layer({f"data-{n}": dice.randbytes(layer_bytes)}, docker=docker) for n in range(layers)], docker=docker
    )
