"""Room on a disk: first come, first served, never more than there is; and how much a layer will likely take."""

import pytest

from cluster.descriptor import Descriptor
from cluster.digest import chain_id, digest_of
from cluster.disk_room import (
    ENTRY_BYTES,
    Admitted,
    Claim,
    Part,
    Short,
    admit,
    snapshot_key,
    snapshot_parts,
    taken_bytes,
)

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
PLAIN = "application/vnd.oci.image.layer.v1.tar"
SIZE = 1_000_000


def claim(ticket, *, held=0, asked=None):
    return Claim(ticket=ticket, what=f"claim {ticket}", pid=1, held_bytes=held, asked_bytes=asked)


def asking(ticket, *others, asked, least=None, free=100, headroom=10, **more):
    return admit(
        ticket,
        others,
        asked_bytes=asked,
        least_bytes=asked if least is None else least,
        free_bytes=free,
        headroom_bytes=headroom,
        **more,
    )


def test_all_but_the_headroom_is_given():
    """The last byte before the headroom is given, the one after it is not."""
    assert asking(1, asked=90) == Admitted(90)
    assert asking(1, asked=91) == Short(missing_bytes=1, is_first=True)


def test_what_is_reserved_is_not_free():
    """The disk knows nothing of what is reserved and not yet written."""
    assert asking(2, claim(1, held=60), asked=30) == Admitted(30)
    assert asking(2, claim(1, held=60), asked=31) == Short(missing_bytes=1, is_first=True)
    assert asking(2, asked=31, held_bytes=60) == Short(missing_bytes=1, is_first=True)


def test_nobody_is_served_from_what_another_waits_for():
    """A small one fits beside a big one that came first, or waits behind it; that one isn't held up by it."""
    big = claim(1, asked=200)
    assert asking(2, big, asked=1) == Short(missing_bytes=111, is_first=False)
    assert asking(2, claim(1, asked=80), asked=10) == Admitted(10)
    assert asking(1, claim(2, asked=80), asked=90) == Admitted(90)


def test_a_disk_that_others_filled_is_nobodys():
    """Less than the headroom may be free: then even what needs nothing has to wait."""
    assert asking(1, asked=0, free=5) == Short(missing_bytes=5, is_first=True)


def test_an_estimate_gives_way_where_nobody_could_give_room_back():
    """Alone on the disk, or when it has waited long enough, one takes what is there, if that is the least it needs."""
    assert asking(1, asked=200, least=50) == Admitted(90)
    assert asking(1, asked=200, least=91) == Short(missing_bytes=110, is_first=True)
    held = claim(2, held=20)
    assert asking(1, held, asked=200, least=50) == Short(missing_bytes=130, is_first=True)
    assert asking(1, held, asked=200, least=50, is_last=True) == Admitted(70)
    assert asking(2, claim(1, asked=60), asked=50, least=20) == Short(missing_bytes=20, is_first=False)
    assert asking(2, claim(1, asked=60), asked=50, least=20, is_last=True) == Admitted(30)


def test_who_grows_comes_before_who_is_new():
    """A reservation asks for more by its own place in line: what it holds comes free the sooner."""
    grower, newcomer = claim(1, held=50, asked=30), claim(2, asked=30)
    assert asking(1, newcomer, asked=30, held_bytes=50) == Admitted(30)
    assert asking(2, grower, asked=30) == Short(missing_bytes=20, is_first=False)


# -- how much -----------------------------------------------------------------------------------------------


def layers(*kinds):
    made, chain = [], None
    for number, kind in enumerate(kinds):
        diff_id = digest_of(b"diff %d" % number)
        chain = chain_id(chain, diff_id)
        blob = Descriptor(media_type=kind, digest=digest_of(b"%d" % number), size_bytes=SIZE, diff_id=diff_id)
        made.append((chain, blob))
    return made


def parts_of(made, lacking=None, known=None, *, are_whole=False):
    lacking = [chain for chain, _ in made] if lacking is None else lacking
    return snapshot_parts(made, lacking, (known or {}).get, are_whole=are_whole)


def test_a_layer_is_taken_for_more_than_its_blob():
    """A compressed one unpacks to more, likely; in any case to as much; one that isn't compressed to as much."""
    made = layers(GZIP, PLAIN)
    packed, plain = parts_of(made)
    assert packed.key == snapshot_key(made[0][0])
    assert packed.least_bytes == SIZE
    assert 2 * SIZE < packed.likely_bytes < 4 * SIZE
    assert plain == Part(key=snapshot_key(made[1][0]), likely_bytes=SIZE, least_bytes=SIZE)


def test_a_layer_that_was_unpacked_before_is_known():
    """What it came to then is what it comes to again, be that more or less than it looks."""
    made = layers(GZIP)
    known = taken_bytes(500, 3)
    assert known == 500 + 3 * ENTRY_BYTES
    (part,) = parts_of(made, known={made[0][1].digest: known})
    assert (part.likely_bytes, part.least_bytes) == (known, known)


def test_only_what_is_lacking_is_counted():
    """A snapshot that is here takes no room again."""
    made = layers(PLAIN, PLAIN, PLAIN)
    assert [part.key for part in parts_of(made, lacking={made[1][0]})] == [snapshot_key(made[1][0])]


@pytest.mark.parametrize("are_whole", [False, True])
def test_a_whole_snapshot_has_what_is_below_it_too(are_whole):
    """Of those that copy their parent, each has the files of all layers below, here already or not."""
    made = layers(PLAIN, PLAIN, PLAIN)
    (top,) = parts_of(made, lacking={made[2][0]}, are_whole=are_whole)
    assert top.likely_bytes == (3 * SIZE if are_whole else SIZE)
    assert top.least_bytes == SIZE
