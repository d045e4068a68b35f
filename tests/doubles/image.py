"""A real image for the demo, the benchmarks and the tests: Debian, from its packages, with every kind of entry.

Seven layers, some 90 MB as gzip: a minimal Debian; Python; git; tools; a layer made by hand with what
layers can say (whiteouts, an opaque directory, hard links, one into a lower layer, setuid, a capability,
an xattr, a FIFO, a sparse file, a long name); an empty one; and a last small one. It is kept as an OCI
layout under the user's cache directory, so that it is built once a machine. So are the two images that the
demo's Dockerfile begins with: a Debian with a compiler, and one with two libraries and nothing else.

Run as a program it builds the image and can push it::

    python -m tests.doubles.image --push 127.0.0.1:5000/demo:1 --format docker
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import zstandard

from tests.doubles.oci_layout import ImageLayer, ImageToolError, LayoutImage, LayoutWriter, push, read_image, run_tool

Compression = Literal["gzip", "zstd"]

SUITE = "bookworm"
#: Packages of the layers above the minimal system, lowest first.
PACKAGES: tuple[tuple[str, ...], ...] = (("python3",), ("git",), ("binutils", "make"))
#: Of the image that compiles, above the same minimal system: the compiler, and a library's headers.
COMPILER_PACKAGES: tuple[tuple[str, ...], ...] = (("gcc", "libc6-dev"), ("zlib1g-dev",))
#: What that image goes without, as slim images do: a third of the minimal system.
_SLIM = tuple(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "lintian", "locale", "man"))
#: All that is in the image that programs run in: what they link to.
RUNTIME_PACKAGES = ("libc6", "zlib1g")
#: A program of the image, run from an extracted root: it reads what several layers brought and prints JSON.
PROGRAM = "/srv/app/hello"

_CHUNK_BYTES = 1 << 20
#: Images of older recipes go once nobody has asked for them for so long.
_UNUSED_S = 7 * 24 * 3600
_COMPRESSIONS: tuple[Compression, ...] = ("gzip", "zstd")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

_PROGRAM_TEXT = """\
#!/usr/bin/python3
import json, os, platform, subprocess
print(json.dumps({
    "python": platform.python_version(),
    "git": subprocess.run(["/usr/bin/git", "--version"], check=True, capture_output=True, text=True).stdout.strip(),
    "greeting": open("/srv/app/greeting").read().strip(),
    "docs": os.path.exists("/usr/share/doc/git"),
    "opaque": sorted(os.listdir("/usr/share/bash-completion")) if os.path.isdir("/usr/share/bash-completion") else [],
}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """What the demo's Dockerfile begins with."""

    #: gcc, and zlib to compile against: three layers, some 110 MB.
    compiler: LayoutImage
    #: libc and zlib: one layer, some 5 MB, and no shell.
    runtime: LayoutImage


def cached_image(compression: Compression = "gzip", *, cache_root: Path | None = None) -> LayoutImage:
    """Return the demo image, building it where this machine has none of this recipe yet.

    Safe to call from several processes: one builds, under a lock, and publishes by a rename.

    Raises:
        ImageToolError: it can't be built on this machine.
    """
    return read_image(_cached("demo-image", _build, cache_root), compression)


def cached_bases(*, cache_root: Path | None = None) -> Bases:
    """Return the bases of the demo's Dockerfile; as :func:`cached_image`."""
    place = _cached("demo-bases", _build_bases, cache_root)
    return Bases(compiler=read_image(place, "compiler"), runtime=read_image(place, "runtime"))


def _cached(name: str, build: Callable[[Path], None], cache_root: Path | None) -> Path:
    root = cache_root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyfarm"
    root.mkdir(parents=True, exist_ok=True)
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    place = root / f"{name}-{recipe}"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _drop_unused(root, name)
            with tempfile.TemporaryDirectory(prefix="building-", dir=root) as work:
                build(Path(work))
                (Path(work) / "layout").rename(place)
        place.touch()  # in use: see _drop_unused
    return place


def _drop_unused(root: Path, name: str) -> None:
    for image in root.glob(f"{name}-*/"):
        if time.time() - image.stat().st_mtime > _UNUSED_S:
            shutil.rmtree(image)


# -- building ---------------------------------------------------------------------------------------------


def _build(work: Path) -> None:
    root = work / "root"
    layers = _Layers(LayoutWriter(work / "layout"), work, {compression: compression for compression in _COMPRESSIONS})
    _add_debian(layers, work, root, PACKAGES)
    layers.add_tar(_special_layer(root), "what layers can say")
    layers.add_tar(_tar_of(()), "nothing")
    layers.add_tar(_tar_of([_file("srv/app/greeting", b"hello from the top layer\n")]), "a greeting")
    layers.finish({"Cmd": [PROGRAM], "Env": [f"PATH={_PATH}"]})


def _build_bases(work: Path) -> None:
    writer = LayoutWriter(work / "layout")
    compiler = _Layers(writer, work, {"gzip": "compiler"})
    _add_debian(compiler, work, work / "compiler", COMPILER_PACKAGES, _SLIM)
    compiler.finish({"Cmd": ["/bin/sh"], "Env": [f"PATH={_PATH}"]})
    runtime = _Layers(writer, work, {"gzip": "runtime"})
    # Unpacked and no more: what has no shell can't run the packages' scripts.
    _bootstrap(work / "runtime", "extract", f"--include={','.join(RUNTIME_PACKAGES)}")
    runtime.add_changes(work / "runtime", {}, f"dpkg-deb --extract {' '.join(RUNTIME_PACKAGES)}")
    runtime.finish({"Env": [f"PATH={_PATH}"]})


def _add_debian(
    layers: _Layers, work: Path, root: Path, packages: Iterable[tuple[str, ...]], options: Iterable[str] = ()
) -> None:
    """Add a layer of the minimal system, and one for each group of packages that is installed in it."""
    _bootstrap(root, "minbase", *options)
    before = layers.add_changes(root, {}, f"mmdebstrap --variant=minbase {SUITE}")
    with _apt_ready(work, root) as install:
        for group in packages:
            install(group)
            before = layers.add_changes(root, before, f"apt-get install {' '.join(group)}")


def _bootstrap(root: Path, variant: str, *options: str) -> None:
    if os.geteuid() != 0:
        raise ImageToolError("the demo's images are built with mmdebstrap and chroot, which need root: use sudo")
    run_tool(
        "mmdebstrap", "--quiet", "--mode=root", f"--variant={variant}", *options, SUITE, str(root), *_apt_sources()
    )
    # mmdebstrap leaves the package lists, which no image carries.
    for leftover in (*(root / "var/lib/apt/lists").glob("*"), *(root / "var/cache/apt").glob("*.bin")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _apt_sources() -> list[str]:
    """Return this machine's own Debian sources of the suite; none lets mmdebstrap choose.

    A machine behind a mirror of its own then needs no other host.
    """
    targets = subprocess.run(
        [
            *("apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)"),
            *("Created-By: Packages", "Origin: Debian"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    sources: dict[tuple[str, str], list[str]] = {}
    for line in targets.stdout.splitlines():
        codename, uri, release, component = line.split()
        if codename in (SUITE, f"{SUITE}-updates", f"{SUITE}-security") and component not in sources.setdefault(
            (uri, release), []
        ):
            sources[uri, release].append(component)
    return [f"deb {uri} {release} {' '.join(components)}" for (uri, release), components in sources.items()]


@contextmanager
def _apt_ready(work: Path, root: Path) -> Iterator[Callable[[tuple[str, ...]], None]]:
    """Yield a function that installs packages in *root* and leaves nothing there but them."""
    lists, archives = work / "lists", work / "archives"
    for directory in (lists, archives):
        (directory / "partial").mkdir(parents=True)
    script = (
        'mount -t proc proc "$1/proc"; mount --bind "$2" "$1/var/lib/apt/lists"; '
        'mount --bind "$3" "$1/var/cache/apt/archives"; mount --bind /etc/resolv.conf "$1/etc/resolv.conf"; '
        'root=$1; shift 3; exec chroot "$root" /usr/bin/env -i DEBIAN_FRONTEND=noninteractive LC_ALL=C '
        f'PATH={_PATH} "$@"'
    )

    def in_root(*command: str) -> None:
        run_tool(
            *("unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"),
            *(str(root), str(lists), str(archives), *command),
        )

    options = ["-q", "-y", "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "-o", "Acquire::Retries=3"]
    resolv = root / "etc/resolv.conf"
    made_resolv = not resolv.exists()
    resolv.touch()
    in_root("apt-get", *options, "update")

    def install(packages: tuple[str, ...]) -> None:
        in_root("apt-get", *options, "install", "--no-install-recommends", *packages)
        for log in (root / "var/log").rglob("*.log"):
            log.write_bytes(b"")

    yield install
    if made_resolv:
        resolv.unlink()


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What changes when a file does. The change time can't be set by anybody: nothing escapes it."""

    inode: int
    changed_ns: int
    is_directory: bool


def _scan(root: Path) -> dict[str, _Stamp]:
    stamps = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = f"{directory}/{name}"
            found = os.lstat(path)
            stamps[os.path.relpath(path, root)] = _Stamp(found.st_ino, found.st_ctime_ns, stat.S_ISDIR(found.st_mode))
    return stamps


class _Layers:
    """Makes layers, once in each compression, and then an image of each, under its tag."""

    def __init__(self, writer: LayoutWriter, work: Path, tags: Mapping[Compression, str]) -> None:
        self._writer = writer
        self._work = work
        self._tags = tags
        self._history: list[str] = []
        self._layers: dict[Compression, list[ImageLayer]] = {compression: [] for compression in tags}

    def add_changes(self, root: Path, before: dict[str, _Stamp], what: str) -> dict[str, _Stamp]:
        """Add a layer of what differs in *root* from *before*; return how it is now."""
        now = _scan(root)
        changed = sorted(path for path, stamp in now.items() if before.get(path) != stamp)
        gone = sorted(path for path in before if path not in now)
        with tempfile.TemporaryFile(dir=self._work) as out:
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for path in changed:
                    _add_path(tar, root, path)
                for path in gone:
                    parent, _, name = path.rpartition("/")
                    if parent in now or not parent:
                        tar.addfile(tarfile.TarInfo(f"{parent}/.wh.{name}".lstrip("/")))
            out.seek(0)
            self.add_tar(out, what)
        return now

    def add_tar(self, tar: IO[bytes], what: str) -> None:
        """Add *tar* as a layer."""
        diff = hashlib.sha256()
        with ExitStack() as stack:
            packed = [stack.enter_context(self._packing(compression)) for compression in self._tags]
            while chunk := tar.read(_CHUNK_BYTES):
                diff.update(chunk)
                for out in packed:
                    out.write(chunk)
        self._history.append(what)
        for compression, layers in self._layers.items():
            digest, size_bytes = self._writer.keep(compression)
            layers.append(
                ImageLayer(
                    digest=digest,
                    size_bytes=size_bytes,
                    diff_id=f"sha256:{diff.hexdigest()}",
                    media_type=f"application/vnd.oci.image.layer.v1.tar+{compression}",
                )
            )

    @contextmanager
    def _packing(self, compression: Compression) -> Iterator[IO[bytes]]:
        with self._writer.new_blob(compression) as raw:
            if compression == "gzip":
                # zlib's own level: what registries are full of.
                with gzip.GzipFile("", "wb", zlib.Z_DEFAULT_COMPRESSION, raw, mtime=0) as packed:
                    yield packed
            else:
                with zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
                    yield packed

    def finish(self, config: Mapping[str, object]) -> None:
        """Write the images, with what their configurations say of running them."""
        base = {
            "created": "2024-01-01T00:00:00Z",
            "architecture": run_tool("dpkg", "--print-architecture").strip(),
            "os": "linux",
            "config": config,
        }
        for compression, layers in self._layers.items():
            self._writer.add_image(self._tags[compression], layers, base=base, history=self._history)


def _add_path(tar: tarfile.TarFile, root: Path, path: str) -> None:
    """Add one path with its xattrs; a second name of a file becomes a hard link (tarfile sees to it)."""
    full = root / path
    if stat.S_ISSOCK(full.lstat().st_mode):
        return
    entry = tar.gettarinfo(str(full), path)
    entry.pax_headers = {
        f"SCHILY.xattr.{name}": os.getxattr(full, name, follow_symlinks=False).decode("utf-8", "surrogateescape")
        for name in os.listxattr(full, follow_symlinks=False)
    }
    if entry.isreg():
        with full.open("rb") as content:
            tar.addfile(entry, content)
    else:
        tar.addfile(entry)


# -- the layer made by hand ----------------------------------------------------------------------------------

_Entry = tuple[tarfile.TarInfo, bytes]


def _file(name: str, content: bytes = b"", *, mode: int = 0o644, xattrs: dict[str, str] | None = None) -> _Entry:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(content), mode, 1_700_000_000
    entry.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return entry, content


def _special(name: str, kind: bytes, *, link: str = "", mode: int = 0o755) -> _Entry:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mode, entry.mtime = kind, link, mode, 1_700_000_000
    return entry, b""


def _special_layer(root: Path) -> io.BytesIO:
    """Return a layer with each kind of entry that layers below it don't have."""
    # cap_net_raw+ep, as the kernel keeps it (struct vfs_cap_data, revision 2).
    capability = bytes.fromhex("0100000200200000000000000000000000000000").decode("latin-1")
    long_name = "srv/app/" + "long-" * 30 + "/" + "name-" * 40
    entries = [
        _special("srv/app", tarfile.DIRTYPE),
        _file(PROGRAM[1:], _PROGRAM_TEXT.encode(), mode=0o755),
        _file("srv/app/greeting", b"hello\n"),
        _special("srv/app/hello-too", tarfile.LNKTYPE, link=PROGRAM[1:]),
        # A link to a file that only a lower layer has.
        _special("srv/app/git", tarfile.LNKTYPE, link="usr/bin/git"),
        _special("srv/app/python", tarfile.SYMTYPE, link="/usr/bin/python3", mode=0o777),
        _special("srv/app/queue", tarfile.FIFOTYPE, mode=0o600),
        _file("srv/app/as-root", b"#!/bin/sh\n", mode=0o4755),
        _file("srv/app/ping", b"#!/bin/sh\n", mode=0o755, xattrs={"security.capability": capability}),
        _file("srv/app/noted", b"noted\n", xattrs={"user.lazyfarm.note": "kept"}),
        _file("srv/app/sparse", b"\0" * (4 << 20) + b"end\n"),
        _file(long_name, b"long\n"),
        # Gone: a directory of a lower layer, and one file of another.
        _file("usr/share/doc/.wh.git"),
    ]
    if (root / "usr/share/bash-completion").is_dir():
        # Made anew: nothing of the lower layers' directory shows through.
        entries += [
            _special("usr/share/bash-completion", tarfile.DIRTYPE),
            _file("usr/share/bash-completion/.wh..wh..opq"),
            _file("usr/share/bash-completion/only", b"only this\n"),
        ]
    return _tar_of(entries)


def _tar_of(entries: Iterable[_Entry]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, content in entries:
            tar.addfile(entry, io.BytesIO(content))
    out.seek(0)
    return out


def main() -> int:
    """Build, print what there is, and push where asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.doubles.image", description=__doc__.split("\n")[0])
    parser.add_argument("--push", metavar="HOST:PORT/REPOSITORY:TAG", help="push it there over plain HTTP")
    parser.add_argument("--format", choices=["oci", "docker", "zstd"], default="oci", help="how to push (oci)")
    options = parser.parse_args()
    try:
        image = cached_image("zstd" if options.format == "zstd" else "gzip")
        if options.push:
            push(image, options.push, as_docker=options.format == "docker")
    except ImageToolError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for layer in image.layers:
        print(f"{layer.digest}  {layer.size_bytes / 1e6:8.2f} MB")
    print(f"{len(image.layers)} layers, {image.size_bytes / 1e6:.1f} MB, in {image.layout}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
