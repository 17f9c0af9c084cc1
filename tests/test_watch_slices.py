"""The kept slices of history: what is kept, and what would be wrong to keep."""

from __future__ import annotations

from typing import Any

from etcdlite.watch_slices import Slices


def events(first: int, count: int, body: bytes = b"v") -> Any:
    return [(first + n, b"k", False, body) for n in range(count)]


def test_the_latest_slices_are_kept_with_what_is_encoded_of_them():
    slices = Slices(2, 1000)
    for first in (1, 11, 21):
        slices.keep(first, events(first, 10), {(first, b"k"): b"event"})
    assert slices.get(1) == (None, {})
    assert slices.get(11) == (events(11, 10), {(11, b"k"): b"event"})
    slices.clear()
    assert slices.get(11) == (None, {})


def test_a_slice_that_is_too_large_is_not_kept():
    slices = Slices(2, 1000)
    slices.keep(1, events(1, 1, b"v" * 1001), {})
    slices.keep(2, events(2, 1), {(2, b"k"): b"v" * 1000})
    slices.keep(3, events(3, 1000), {})
    assert [slices.get(first)[0] for first in (1, 2, 3)] == [None] * 3


def test_a_slice_without_events_is_not_kept():
    """The store tells no events when there are none yet: later there are."""
    slices = Slices(2, 1000)
    slices.keep(5, [], {})
    assert slices.get(5) == (None, {})
