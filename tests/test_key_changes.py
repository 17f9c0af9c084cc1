"""Counts as of older revisions, against a plain model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.store_rig import SMALL_LIMITS, StoreRig

from etcdlite import proto
from etcdlite.mvcc import Store
from etcdlite.ranges import MAX_COUNTED, MAX_COUNTED_BYTES, range_steps
from etcdlite.storage.key_changes import KeyChanges
from etcdlite.storage.steps import finish

NAMES = [b"%02d" % number for number in range(30)]
BORDERS = st.sampled_from([*NAMES, *(name + b"\0" for name in NAMES)])


def answered(store: Store, request: proto.RangeRequest) -> proto.RangeResponse:
    return proto.RangeResponse.decode(finish(range_steps(store, request)))


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(("put", "put", "put", "delete", "delete range", "txn")),
            BORDERS,
            BORDERS,
        ),
        max_size=40,
    ),
    compact_at=st.integers(0, 60),
    kept=st.sampled_from((1, 4, 100)),
    start=BORDERS,
    end=BORDERS,
)
def test_a_range_is_counted_as_of_any_revision(
    changes: list[tuple[str, bytes, bytes]], compact_at: int, kept: int, start: bytes, end: bytes
) -> None:
    rig = StoreRig(limits=SMALL_LIMITS._replace(kept_key_changes=kept))
    for number, (kind, key, other) in enumerate(changes):
        if kind == "put":
            rig.put(key)
        elif kind == "delete":
            rig.delete(key)
        elif kind == "delete range":
            rig.delete(key, other)
        else:
            operations = [
                proto.RequestOp(request_delete_range=proto.DeleteRangeRequest(key=key)),
                proto.RequestOp(request_put=proto.PutRequest(key=other + b"x")),
            ]
            rig.apply(proto.TxnRequest(success=operations))
        if number == compact_at and rig.store.revision > 1:
            rig.compact(rig.store.revision - 1)
            rig.finish_compaction()
    for revision in range(max(1, rig.store.compacted), rig.store.revision + 1):
        for key, range_end in ((b"\0", b"\0"), (start, b"\0"), (start, end)):
            for fields in ({"count_only": True}, {"limit": 2}):
                request = proto.RangeRequest(
                    key=key, range_end=range_end, revision=revision, **fields
                )
                assert answered(rig.store, request) == rig.model.range(request), request


@pytest.mark.parametrize("seed", range(4))
def test_a_range_is_counted_as_of_older_revisions_while_keys_are_deleted(seed: int) -> None:
    rng = random.Random(seed)
    for kept in (2, 100):
        rig = StoreRig(limits=SMALL_LIMITS._replace(kept_key_changes=kept))
        for name in NAMES:
            rig.put(name)
        rig.delete(b"03", b"09")
        rig.put(b"05")
        rig.begin_entry(proto.DeleteRangeRequest(key=b"02", range_end=b"27"))
        while rig.entry is not None:
            for revision in (rig.store.revision, rig.store.revision - 1, 20):
                start, end = rng.choice(NAMES), rng.choice((b"\0", *NAMES))
                request = proto.RangeRequest(
                    key=start, range_end=end, revision=revision, count_only=True
                )
                assert answered(rig.store, request) == rig.model.range(request), request
            rig.go_on_applying()


def test_a_page_at_an_older_revision_visits_no_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = StoreRig(limits=SMALL_LIMITS._replace(kept_key_changes=50))
    for number in range(200):
        rig.put(b"%03d" % number)
    page = proto.RangeRequest(key=b"\0", range_end=b"\0", limit=2, revision=rig.store.revision)
    for number in range(0, 40, 2):
        rig.put(b"%03d/new" % number)
        rig.delete(b"%03d" % (number + 100))
    visited: list[bytes] = []
    index = rig.store.index
    at = index.at
    monkeypatch.setattr(index, "at", lambda key, revision: visited.append(key) or at(key, revision))
    answer = answered(rig.store, page)
    assert (answer.count, answer.more, len(answer.kvs)) == (200, True, 2)
    assert len(visited) < 10, "the count walked the rest of the range"


def many_changes_later() -> tuple[StoreRig, int]:
    """A rig that has forgotten the changes since a revision with 200 keys, and the revision."""
    rig = StoreRig()
    for number in range(200):
        rig.put(b"%03d" % number)
    revision = rig.store.revision
    for number in range(0, 40, 2):
        rig.put(b"%03d/new" % number)
        rig.delete(b"%03d" % (number + 100))
    rig.delete(b"150", b"180")
    return rig, revision


def test_the_pages_of_a_list_count_a_page_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, revision = many_changes_later()
    steps: list[bytes] = []
    index = rig.store.index
    some = index.count_some
    monkeypatch.setattr(index, "count_some", lambda *span: steps.append(span[0]) or some(*span))
    page = proto.RangeRequest(key=b"\0", range_end=b"\0", limit=5, revision=revision)
    for left in range(200, 0, -5):
        answer = answered(rig.store, page)
        assert answer == rig.model.range(page)
        assert (answer.count, answer.more, len(answer.kvs)) == (left, left > 5, 5)
        assert left == 200 or len(steps) < 10, (
            f"with {left} keys left, a page counted beyond itself"
        )
        steps.clear()
        page.key = answer.kvs[-1].key + b"\0"
    page.key = b"\0"
    rig.compact(revision)
    rig.finish_compaction()
    assert answered(rig.store, page) == rig.model.range(page)


@pytest.mark.parametrize("seed", range(4))
def test_lists_at_older_revisions_are_counted_while_keys_change(seed: int) -> None:
    rng = random.Random(seed)
    rig, revision = many_changes_later()
    for _ in range(300):
        key = b"%03d" % rng.randrange(200)
        act = rng.choice(("put", "delete", "delete range", "list", "list", "list"))
        if act == "put":
            rig.put(key + rng.choice((b"", b"/new")))
        elif act == "delete":
            rig.delete(key)
        elif act == "delete range":
            rig.finish_entry()
            rig.begin_entry(proto.DeleteRangeRequest(key=key, range_end=key[:2] + b"~"))
            rig.go_on_applying()
        request = proto.RangeRequest(
            key=key, range_end=rng.choice((b"\0", b"150", b"200", key)), limit=rng.randrange(4),
            revision=rng.choice((0, revision, revision + 20, rig.store.revision)),
        )  # fmt: skip
        assert answered(rig.store, request) == rig.model.range(request), request


def test_a_count_is_remembered_if_its_keys_are_short() -> None:
    rig, revision = many_changes_later()
    for number in range(2 * MAX_COUNTED):
        for end in (b"1%03d" % number, b"2" * MAX_COUNTED_BYTES):
            request = proto.RangeRequest(key=b"0", range_end=end, limit=1, revision=revision)
            assert answered(rig.store, request) == rig.model.range(request)
    assert len(rig.store.counted) == MAX_COUNTED
    assert all(len(end or b"") < 10 for _, end in rig.store.counted)


def test_changes_beyond_the_limit_are_forgotten() -> None:
    changes = KeyChanges(1, 3)
    for revision in range(2, 9):
        changes.born.append(b"k%d" % revision)
        changes.born_at.append(revision)
        changes.trim()
    assert changes.born == [b"k6", b"k7", b"k8"] and changes.since == 5
    assert changes.growth(b"", None, 4, 8) is None
    assert changes.growth(b"", None, 5, 8) == 3
    assert changes.growth(b"k7", b"k8", 5, 8) == 1
    assert changes.growth(b"", None, 5, 7) == 2
    changes.add_gone([b"k7", b"k8"], 9)
    assert changes.growth(b"", None, 5, 9) == 1
    changes.forget(9)
    assert changes.growth(b"", None, 8, 9) is None and changes.growth(b"", None, 9, 9) == 0
    assert not changes.born and not changes.gone
