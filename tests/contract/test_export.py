"""Images of builds, assembled and exported over real stores, as skopeo and umoci read them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from dataclasses import replace

import pytest

from cluster.fetch.access import AccessControl
from cluster.fetch.assemble import Assembler
from cluster.fetch.keep import Keeper
from cluster.flight.values import Owned
from cluster.lease import LeaseId
from cluster.origin import OPEN
from cluster.provider import FARM
from cluster.ref import BlobRecord, RefRecord
from cluster.reference import default_platform, parse_reference
from lazyfarm.export import Exporter
from lazyfarm.outputs import parse_output
from storage.blobs import S3ContentStore
from storage.fetching import StoredBlobs, new_key
from tests.doubles.fetch import FakeAuthorizer, FakeProber
from tests.doubles.layers import directory, file, layer, sketch, symlink, whiteout

pytestmark = [
    pytest.mark.s3,
    pytest.mark.redis,
    pytest.mark.skipif(
        not (shutil.which("skopeo") and shutil.which("umoci")), reason="skopeo or umoci is not installed"
    ),
]

LEASE = LeaseId("l1")
CONFIG = json.dumps({"config": {"Cmd": ["/bin/tool"]}, "history": [{"created_by": "COPY"}]}).encode()
DATA = secrets.token_bytes(3_000_000)
LAYERS = [
    layer(directory("bin", 0o755), file("bin/tool", b"#!/bin/sh\n", mode=0o755), file("gone", b"")),
    layer(whiteout("gone"), symlink("link", "bin/tool"), file("data", DATA)),
]
FILES = {
    "bin": "directory",
    "bin/tool": b"#!/bin/sh\n",
    "link": "-> bin/tool",
    "data": DATA,
}


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
async def exported(redis_farm, s3_config):
    """An image that was assembled of two built layers, and what exports it."""
    stores, store = redis_farm.stores(), S3ContentStore(s3_config)
    renewer = stores.new_renewer()
    keeper = Keeper(
        worker="w",
        leases=stores.leases,
        flights=stores.flights,
        renewer=renewer,
        small=StoredBlobs(store),
        new_token=lambda: secrets.token_hex(8),
        flight_ttl_s=6.0,
    )
    access = AccessControl(stores.proofs, FakeProber(), proof_ttl_s=100.0)
    await stores.leases.create(LEASE, ttl_s=60.0)
    records = []
    for made in LAYERS:
        digest = made.descriptor.digest
        info = store.put(new_key(digest), made.blob)
        owned = await stores.flights.join(f"blob:{digest}", worker="w", token=secrets.token_hex(8), ttl_s=6.0)
        assert isinstance(owned, Owned)
        blob = BlobRecord(
            digest=digest, key=info.key, size_bytes=info.size_bytes, etag=info.etag, fence=owned.fence.number
        )
        await stores.flights.commit(owned.fence, blob)
        record = RefRecord.over(made.descriptor, records[-1] if records else None)
        records.append(replace(record, origins=(OPEN,)))
    await stores.refs.get_or_create(records, {r.blob.digest: [FARM] for r in records}, lease_id=LEASE)
    assembler = Assembler(
        refs=stores.refs,
        leases=stores.leases,
        access=access,
        keeper=keeper,
        platform=default_platform(os.uname().machine),
    )
    image = await assembler.assemble(
        parse_reference("r.example/app:v1"),
        records[-1].id,
        CONFIG,
        FakeAuthorizer(),
        handlers=(),
        lease_id=LEASE,
        created_s=None,
    )
    yield image, Exporter(store, stores.refs)
    renewer.close()
    store.close()


def unpacked(layout, tag, bundle):
    run("umoci", "unpack", "--rootless", "--image", f"{layout}:{tag}", str(bundle))
    return sketch(bundle / "rootfs")


async def test_an_exported_layout_is_read_by_skopeo_and_unpacked_by_umoci(exported, tmp_path):
    """The manifest's digest, the layers, the command, and the very files."""
    image, exporter = exported
    await exporter.export(image, parse_output(f"oci:{tmp_path}/layout"))
    inspected = json.loads(run("skopeo", "inspect", f"oci:{tmp_path}/layout:v1"))
    assert inspected["Digest"] == image.manifest.digest
    assert inspected["Layers"] == [made.descriptor.digest for made in LAYERS]
    config = json.loads(run("skopeo", "inspect", "--config", f"oci:{tmp_path}/layout:v1"))
    assert config["config"]["Cmd"] == ["/bin/tool"]
    assert [entry["created"] for entry in config["history"]] == [config["created"]] * 2
    assert unpacked(tmp_path / "layout", "v1", tmp_path / "bundle") == FILES


async def test_an_exported_archive_is_copied_by_skopeo_with_every_digest_checked(exported, tmp_path):
    """Into a layout, which then has the same files."""
    image, exporter = exported
    await exporter.export(image, parse_output(f"type=oci,dest={tmp_path}/a.tar"))
    run("skopeo", "copy", "--preserve-digests", f"oci-archive:{tmp_path}/a.tar:v1", f"oci:{tmp_path}/copy:x")
    assert json.loads(run("skopeo", "inspect", f"oci:{tmp_path}/copy:x"))["Digest"] == image.manifest.digest
    assert unpacked(tmp_path / "copy", "x", tmp_path / "bundle") == FILES


async def test_exported_files_are_those_that_umoci_unpacks(exported, tmp_path):
    """One image, two readers."""
    image, exporter = exported
    await exporter.export(image, parse_output(f"{tmp_path}/out"))
    await exporter.export(image, parse_output(f"oci:{tmp_path}/layout"))
    assert sketch(tmp_path / "out") == unpacked(tmp_path / "layout", "v1", tmp_path / "bundle")
