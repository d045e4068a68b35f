"""A one-node Ceph with its RADOS gateway on loopback: a second, durable S3 that shares no code with Swift.

Monitor, one OSD on a sparse file, and the gateway, all in the foreground as children of the test session;
no manager daemon, which a cluster of one OSD does without.
"""

from __future__ import annotations

import http.client
import os
import pwd
import subprocess
import time
from pathlib import Path
from typing import Self
from uuid import uuid4

from storage.services.loopback import HOST, choose_ports

_DEADLINE_S = 90.0
_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0,v1:127.0.0.1:{mon_v1}/0]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
run dir = {root}/run
log file = {root}/log/$name.log
admin socket = {root}/run/$name.asok
pid file = {root}/run/$name.pid
keyring = {root}/keyring
[mon]
mon data = {root}/mon
[osd]
osd data = {root}/osd
osd objectstore = bluestore
bluestore block size = 21474836480
bluestore block create = true
bluestore fsck on mount = false
osd memory target = 939524096
bluestore cache autotune = false
bluestore cache size = 134217728
osd class load list = *
osd class default list = *
osd op num shards = 2
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw thread pool size = 32
rgw enable usage log = false
"""


class CephRgw:
    """Starts on entry, and is gone with its processes on exit; the directory is the caller's."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._config = root / "ceph.conf"
        self._children: list[subprocess.Popen[bytes]] = []
        self._ports = choose_ports(["mon", "mon_v1", "rgw"], {})
        self.endpoint = f"http://{HOST}:{self._ports['rgw']}"
        #: Of who makes buckets and says who may use them.
        self.owner_file = root / "owner-credentials"
        #: Of the farm, which may do what buckets' policies let it do.
        self.credentials_file = root / "s3-credentials"

    def __enter__(self) -> Self:
        try:
            self._make()
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.kill()  # nothing in it is wanted any more
        for child in self._children:
            child.wait(_DEADLINE_S)

    def _make(self) -> None:
        root, keyring, user = self._root, str(self._root / "keyring"), pwd.getpwuid(os.geteuid()).pw_name
        for name in ("mon", "osd", "log", "run"):
            (root / name).mkdir()
        fsid, monmap = str(uuid4()), str(root / "monmap")
        self._config.write_text(_CONFIG.format(fsid=fsid, root=root, **self._ports))
        address = f"[v2:127.0.0.1:{self._ports['mon']},v1:127.0.0.1:{self._ports['mon_v1']}]"
        run = self._run
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        run("ceph-authtool", keyring, "--gen-key", "-n", "client.rgw", *everything)
        own = ["--setuser", user, "--setgroup", user]
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring, *own)
        self._start("ceph-mon", "-i", "a", *own)
        osd_key = run("ceph", "auth", "get-or-create", "osd.0", "mon", "allow profile osd", "osd", "allow *")
        with (root / "keyring").open("a") as out:
            out.write(osd_key)
        osd_id = str(uuid4())
        run("ceph", "osd", "new", osd_id, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id, *own)
        run("ceph", "osd", "crush", "add-bucket", "h", "host")
        run("ceph", "osd", "crush", "move", "h", "root=default")
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=h")
        self._start("ceph-osd", "-i", "0", *own)

    def _serve(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        gateway = self._start("radosgw", "-n", "client.rgw", "--setuser", user, "--setgroup", user)
        give_up_at = time.monotonic() + _DEADLINE_S
        while not self._answers():
            assert gateway.poll() is None, "the gateway ended"
            assert time.monotonic() < give_up_at, "the gateway did not answer"
            time.sleep(0.1)
        for user_id, path in (("owner", self.owner_file), ("farm", self.credentials_file)):
            access, secret = f"lazyfarm-{user_id}", f"secret-of-{user_id}-12"
            self._run(
                "radosgw-admin", "user", "create", "--uid", user_id, "--display-name", user_id,
                "--access-key", access, "--secret-key", secret,
            )  # fmt: skip
            path.write_text(f"access_key_id = {access}\nsecret_access_key = {secret}\n")

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [program, "-c", str(self._config), *arguments] if program not in _WITHOUT_CONFIG else [program, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr}"
        return done.stdout

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._root / "log" / f"{program}.out").open("wb") as out:
            child = subprocess.Popen(
                [program, "-f", "-c", str(self._config), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._ports["rgw"], timeout=5.0)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status > 0
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


_WITHOUT_CONFIG = frozenset({"monmaptool", "ceph-authtool"})
