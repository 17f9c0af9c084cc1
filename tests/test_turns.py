"""The order in which the loop serves what is ready."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from etcdlite.turns import MIN_SHARE_S, SLICE_S, Turns


class Files:
    """Files that are always ready, and cost time of a clock that only they move."""

    def __init__(self, count: int, cost_s: float) -> None:
        self.now = 0.0
        self.cost_s = cost_s
        self.served: list[int] = []
        self.turns = Turns(lambda: self.now)
        self.callbacks = [self._callback(n) for n in range(count)]

    def _callback(self, n: int) -> Callable[[int], None]:
        def serve(mask: int) -> None:
            assert self.turns.share_end >= self.now + MIN_SHARE_S
            self.served.append(n)
            self.now += self.cost_s

        return serve

    def turn(self, *numbers: int) -> None:
        callbacks = [self.callbacks[n] for n in numbers] or self.callbacks
        self.turns.serve(dict.fromkeys(callbacks, 1), self.now)


def test_files_that_always_have_input_are_served_equally_often() -> None:
    files = Files(50, cost_s=0.002)
    for _ in range(500):
        files.turn()
    counts = Counter(files.served).values()
    assert len(counts) == 50 and max(counts) - min(counts) <= 1, files.served[:100]


def test_a_turn_ends_with_its_slice() -> None:
    files = Files(50, cost_s=0.002)
    files.turn()
    assert len(files.served) == int(SLICE_S / files.cost_s) + 1


def test_files_are_served_though_their_order_takes_longer_than_a_slice() -> None:
    files = Files(50, cost_s=0.002)
    for _ in range(10):
        took_s = 3 * SLICE_S
        files.turns.serve(dict.fromkeys(files.callbacks, 1), files.now - took_s)
    assert len(files.served) >= 10 * took_s / files.cost_s
    assert set(files.served) == set(range(50))


def test_files_of_members_come_first_in_every_turn() -> None:
    files = Files(50, cost_s=0.002)
    files.turns.first.add(files.callbacks[49])
    for turn in range(20):
        files.turn()
        assert files.served.count(49) == turn + 1


def test_a_file_that_is_not_ready_any_more_loses_its_place() -> None:
    files = Files(6, cost_s=0.002)
    files.turn()
    assert files.served == [0, 1, 2]
    files.turn(0, 1, 5)
    assert files.served == [0, 1, 2, 5, 0, 1]  # not 3 and 4


def test_a_file_that_is_ready_alone_has_the_whole_slice() -> None:
    files = Files(2, cost_s=0.0)
    files.turn(0)
    assert files.turns.share_end == SLICE_S
