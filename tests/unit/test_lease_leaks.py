"""Leases that should not be there any more are found, and no others."""

from __future__ import annotations

from cluster.collect.leaks import Witnesses, find_leaks
from cluster.lease import Lease, LeaseId

NOW = 1_000_000.0
KEPT = 1000.0
MANIFEST = "sha256:" + "a" * 64


def lease(name="l", *, expires=NOW + 50, created=NOW - 5000, resources=("ref:there",), **labels):
    return Lease(
        id=LeaseId(name), expires_wall_s=expires, created_wall_s=created, labels=labels, resources=tuple(resources)
    )


def reasons(*leases, manifests=(), jobs=(), resources=("ref:there",)):
    witnesses = Witnesses(manifests=frozenset(manifests), jobs=dict(jobs), resources=frozenset(resources))
    return [leak.reason for leak in find_leaks(leases, witnesses, now_wall_s=NOW, kept_s=KEPT)]


def image_lease(**options):
    return lease(f"image:{MANIFEST}", expires=None, kind="image", **options)


def test_what_somebody_renews_or_a_person_pinned_is_no_leak():
    assert reasons(lease(owner="driver"), lease(owner="user", expires=None), lease(resources=())) == []


def test_a_lease_of_an_images_documents_ends_with_the_image():
    assert reasons(image_lease(), manifests=[MANIFEST]) == []
    assert "image that is not recorded" in reasons(image_lease())[0]
    assert reasons(image_lease(created=NOW - 5)) == [], "the image is recorded after its lease"


def test_a_jobs_lease_ends_with_the_job():
    held = lease(owner="job", job="j")
    assert reasons(held, jobs={"j": None}) == []
    assert reasons(held, jobs={"j": NOW - 10}) == [], "kept for a while for who asked for it"
    assert "has ended, and goes on" in reasons(held, jobs={"j": NOW - 2 * KEPT})[0]
    assert "nothing is known" in reasons(held)[0]


def test_a_pin_that_nobody_made_is_a_leak():
    assert "has no expiry" in reasons(lease(expires=None, owner="driver"))[0]


def test_a_hold_on_what_is_gone_is_a_leak():
    assert "only what is gone" in reasons(lease(owner="user", resources=["ref:gone", "blob:gone"]))[0]
    assert reasons(lease(owner="user", resources=["ref:gone", "ref:there"])) == []
