"""A base image of this machine's own Debian packages: no repository is asked, and nothing is unpacked to be packed."""

from __future__ import annotations

import gzip
import io
import os
import platform
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from cluster.digest import digest_of
from tests.doubles.registry import Image, Layer, build_image

#: What each Debian has and no package asks for; the C++ library as what apt brings.
_ESSENTIAL = (
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "findutils",
    "grep",
    "hostname",
    "libstdc++6",
    "mount",
    "sed",
    "util-linux",
)
#: What is in a package's place is made when it is installed.
_FILES = {"etc/passwd": "root:x:0:0:root:/root:/bin/bash\n", "etc/group": "root:x:0:\ntty:x:5:\n"}
#: Where authorities of one's own are, which ``update-ca-certificates`` takes up.
_AUTHORITIES = Path("/usr/local/share/ca-certificates")
_MIRROR = "http://deb.debian.org/debian"
_SKIPPED = ("/usr/share/doc/", "/usr/share/locale/", "/usr/share/man/")


def debian_image(*packages: str) -> Image:
    """Make an image of installed packages, of what they depend on, and of a shell with the usual tools; one layer."""
    wanted = _closure([*_ESSENTIAL, *packages])
    listed = subprocess.run(["dpkg-query", "-L", *sorted(wanted)], capture_output=True, text=True, check=True).stdout
    paths = {line for line in listed.splitlines() if line.startswith("/") and not line.startswith(_SKIPPED)}
    # Where Debian has merged /bin into /usr/bin, packages may still say /bin.
    names = {str(Path(path).parent.resolve() / Path(path).name) for path in paths}
    merged = {f"/{name}" for name in ("bin", "lib", "lib64", "sbin") if Path("/", name).is_symlink()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in sorted((names | merged) - {"/", "/."}):
            if os.path.lexists(name):
                tar.add(name, name.lstrip("/"), recursive=False)
        for name, text in _FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    data = gzip.compress(out.getvalue(), compresslevel=1, mtime=0)
    return build_image([Layer("application/vnd.oci.image.layer.v1.tar+gzip", data, digest_of(out.getvalue()))])


def bootstrapped_image(directory: Path) -> Image:
    """Make an image as Debian's own: what apt needs, from the mirror of this machine, and whom this machine trusts.

    Args:
        directory: Takes 200 MB for a moment.
    """
    tree = directory / "root.tar"
    trusted = f"copy-in {' '.join(map(str, _AUTHORITIES.glob('*.crt')))} {_AUTHORITIES}"
    hooks = [f"--customize-hook=mkdir -p $1{_AUTHORITIES}", f"--customize-hook={trusted}"]
    extra = hooks if any(_AUTHORITIES.glob("*.crt")) else []
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    command = ["mmdebstrap", "--quiet", "--variant=apt", "--mode=root", *extra, release, str(tree), _MIRROR]
    subprocess.run(command, capture_output=True, check=True)
    data = tree.read_bytes()
    tree.unlink()
    layer = Layer("application/vnd.oci.image.layer.v1.tar+gzip", gzip.compress(data, 1, mtime=0), digest_of(data))
    return build_image([layer])


def _closure(packages: Iterable[str]) -> set[str]:
    """Return *packages* and all that they depend on, of what is installed; of alternatives the first."""
    fields = r"${db:Status-Abbrev}\t${Package}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    told = subprocess.run(["dpkg-query", "-W", "-f", fields], capture_output=True, text=True, check=True).stdout
    needs: dict[str, list[list[str]]] = {}
    providers: dict[str, str] = {}
    for line in told.splitlines():
        status, package, depends, provides = line.split("\t")
        if status.startswith("ii"):
            needs[package] = [_names(group, "|") for group in depends.split(",")]
            providers |= {name: providers.get(name, package) for name in _names(provides, ",")}
    found: set[str] = set()
    ahead = list(packages)
    while ahead:
        package = ahead.pop()
        if package in found:
            continue
        assert package in needs, f"{package} is not installed"
        found.add(package)
        for group in needs[package]:
            there = [name if name in needs else providers[name] for name in group if name in needs or name in providers]
            ahead += there[:1]
    return found


def _names(text: str, separator: str) -> list[str]:
    return [found[0] for each in text.split(separator) if (found := re.match(r"[a-z0-9][a-z0-9+.-]*", each.strip()))]
