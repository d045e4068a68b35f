"""What goes when something must: BuildKit's rules, on items of any store."""

from __future__ import annotations

import pytest

from cluster.collect.filters import parse_filter
from cluster.collect.plan import keep_bytes, plan, total_bytes
from cluster.collect.policy import KeepPolicy, default_policies
from cluster.collect.values import Item, ItemKind
from cluster.errors import InvalidArgumentError

NOW = 1_000_000.0
EVERYTHING = KeepPolicy(includes_shared=True)


def item(name, *parents, size=10, age=100.0, uses=1, **rest):
    return Item(
        id=name,
        parents=parents,
        size_bytes=size,
        created_wall_s=0.0,
        last_used_wall_s=NOW - age,
        usage_count=uses,
        **rest,
    )


def going(items, policy=EVERYTHING, **options):
    return [gone.id for gone in plan(items, policy, now_wall_s=NOW, **options)]


@pytest.mark.parametrize(
    ("limits", "total", "free", "expected"),
    [
        ({}, 100, 50, None),
        ({"max_used_bytes": 40}, 100, 50, 40),
        ({"max_used_bytes": 400}, 100, 50, 100),
        ({"min_free_bytes": 70}, 100, 50, 80),
        ({"min_free_bytes": 30}, 100, 50, 100),
        ({"min_free_bytes": 500}, 100, 50, 0),
        ({"min_free_bytes": 70, "max_used_bytes": 90}, 100, 50, 80),
        ({"min_free_bytes": 70, "max_used_bytes": 60}, 100, 50, 60),
        ({"min_free_bytes": 500, "reserved_bytes": 30}, 100, 50, 30),
        ({"reserved_bytes": 30}, 100, 50, 30),
        ({"max_used_bytes": 40, "min_free_bytes": 500}, 100, None, 40),
    ],
)
def test_a_limit_is_a_number_of_bytes_to_go_down_to(limits, total, free, expected):
    assert keep_bytes(KeepPolicy(**limits), total_bytes=total, free_bytes=free) == expected


def test_without_a_limit_all_that_nobody_holds_goes_what_stands_on_others_first():
    assert going([item("a"), item("b", "a"), item("c", "b", age=500), item("d", "a", age=1)]) == ["c", "b", "d", "a"]


def test_what_something_held_stands_on_stays():
    assert going([item("a"), item("b", "a"), item("c", "b", is_held=True), item("d", "a")]) == ["d"]


def test_what_was_used_lately_keeps_its_chain_and_nothing_else():
    items = [item("a", age=900), item("b", "a", age=5), item("other", "a", age=900), item("more", age=900)]
    assert sorted(going(items, KeepPolicy(keep_duration_s=60))) == ["more", "other"]


def test_with_a_limit_the_oldest_and_least_used_go_until_it_is_kept():
    items = [item("old", age=300), item("often", age=300, uses=9), item("new", age=1)]
    assert going(items, KeepPolicy(max_used_bytes=20)) == ["old"]
    assert going(items, KeepPolicy(max_used_bytes=30)) == []
    assert going(items, KeepPolicy(max_used_bytes=5, reserved_bytes=20)) == ["old"]
    assert going(items, KeepPolicy(min_free_bytes=15), free_bytes=0) == ["old", "often"]


def test_a_space_that_two_share_is_freed_with_the_last():
    items = [item("a", space="blob", age=300), item("b", space="blob", age=200), item("c", age=1)]
    assert total_bytes(items) == 20
    assert going(items, KeepPolicy(max_used_bytes=10)) == ["a", "b"]


def test_shared_ones_go_only_where_the_policy_says_so():
    items = [item("a", is_shared=True), item("b")]
    assert going(items, KeepPolicy()) == ["b"]
    assert sorted(going(items)) == ["a", "b"]


def test_what_frees_nothing_stays_unless_it_is_in_the_way():
    lazy = item("lazy", size=0, age=900)
    above = item("above", "big", size=0, age=300)
    items = [lazy, item("big", age=400, size=50), above, item("new", age=1)]
    assert going(items, KeepPolicy(max_used_bytes=20)) == ["above", "big"]
    assert sorted(going(items)) == ["above", "big", "lazy", "new"]


def test_filters_choose():
    items = [
        item("a"),
        item("b", kind=ItemKind.LOCAL),
        item("c", description="pulled from x/y:1"),
        item("d", "a", size=0),
    ]

    def chosen(*filters):
        return sorted(going(items, KeepPolicy(filters=tuple(map(parse_filter, filters)))))

    assert chosen("type==source.local") == ["b"]
    assert chosen("type=source.local", "description~=x/y") == ["b", "c"]
    assert chosen("type!=source.local,id!=c") == ["a", "d"]
    assert chosen("lazy") == chosen("parents==a") == ["d"]
    assert chosen("inuse") == chosen("shared==true") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("size==3", "no field 'size'"),
        ("type", "say what type shall be"),
        ("inuse==maybe", "inuse is true or false"),
        ("id~=(", "no regular expression"),
        ("", "write it as"),
        ("a b", "write it as"),
    ],
)
def test_a_filter_that_can_not_be_read_says_why(text, said):
    with pytest.raises(InvalidArgumentError, match=said):
        parse_filter(text)


def test_the_default_classes_take_the_least_useful_first():
    day = 24 * 3600.0
    sent = item("sent", kind=ItemKind.LOCAL, size=10**9, age=3 * day)
    items = [
        sent,
        item("ancient", age=61 * day),
        item("shared", is_shared=True, size=10**9, age=5 * day),
        item("fresh", size=10**9, age=day),
    ]
    policies = default_policies(reserved_bytes=0, max_used_bytes=15 * 10**8)
    left, gone = list(items), []
    for policy in policies:
        now_gone = plan(left, policy, now_wall_s=NOW)
        gone.append([found.id for found in now_gone])
        left = [found for found in left if found not in now_gone]
    assert gone == [["sent"], ["ancient"], ["fresh"], []]
    assert len(default_policies(reserved_bytes=0, max_used_bytes=0)) == 2
