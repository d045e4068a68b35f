"""S3 for tests: real servers, one each a session, and a proxy that does to their answers what a test says."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.config import S3Config
from storage.blobs import S3ContentStore
from storage.services.state_dir import StateDir
from storage.services.swift import SwiftService
from tests.doubles.ceph import CephRgw
from tests.doubles.s3_faults import S3FaultProxy

#: Few tries and short waits: what a test makes fail, fails soon.
_QUICK = S3Config(bucket="contract", timeout_s=10.0, attempts=3)
_POLICY = Path(__file__).parents[2] / "configs" / "s3-policy.json"


@pytest.fixture(scope="session")
def swift_s3() -> Iterator[S3Config]:
    """A Swift S3 server with a bucket; its configuration."""
    with tempfile.TemporaryDirectory(prefix="lf-s3-") as root:
        state = StateDir(Path(root))
        service = SwiftService(state)
        try:
            with state.lock("s3", deadline_s=60.0):
                service.start(_QUICK)
            config = service.reached_by(_QUICK)
            _make_bucket(config)
            yield config
        finally:
            service.stop()


@pytest.fixture(scope="session")
def ceph_owner() -> Iterator[S3Config]:
    """A Ceph RADOS gateway, as who owns its buckets; the farm's own credentials lie beside."""
    if shutil.which("radosgw") is None:
        pytest.skip("Ceph is not installed (ceph-mon ceph-osd ceph-mgr radosgw ceph-common)")
    with tempfile.TemporaryDirectory(prefix="lf-ceph-") as root, CephRgw(Path(root)) as ceph:
        yield replace(_QUICK, endpoint=ceph.endpoint, credentials_file=str(ceph.owner_file))


@pytest.fixture(scope="session")
def ceph_s3(ceph_owner: S3Config) -> S3Config:
    """A bucket at a Ceph RADOS gateway, as a user who may do there what ``configs/s3-policy.json`` says, and no more.

    So that all of the content store's suite says that no right is missing.
    """
    _make_bucket(ceph_owner)
    policy = json.loads(_POLICY.read_text().replace("BUCKET", ceph_owner.bucket))
    for statement in policy["Statement"]:
        statement["Principal"] = {"AWS": ["arn:aws:iam:::user/farm"]}
    store = S3ContentStore(ceph_owner)
    try:
        store._client.put_bucket_policy(Bucket=ceph_owner.bucket, Policy=json.dumps(policy))
    finally:
        store.close()
    return replace(ceph_owner, credentials_file=str(Path(ceph_owner.credentials_file).with_name("s3-credentials")))


@pytest.fixture
def s3_config(swift_s3: S3Config) -> S3Config:
    """A bucket of the test's own on Swift."""
    config = replace(swift_s3, bucket=f"test-{uuid4().hex}")
    _make_bucket(config)
    return config


@pytest.fixture
def s3_proxy(s3_config: S3Config) -> Iterator[S3FaultProxy]:
    """A fault proxy before the test's own bucket."""
    with S3FaultProxy(s3_config) as proxy:
        yield proxy


def _make_bucket(config: S3Config) -> None:
    store = S3ContentStore(config)
    try:
        store.ensure_bucket()
    finally:
        store.close()
