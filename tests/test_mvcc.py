"""The store against a plain model of it: every operation, every interleaving, every crash."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from plain_model import Requests
from store_rig import StoreRig, finish, outcome, take_small_steps

from etcdlite import proto, txn
from etcdlite.errors import EtcdError

SEEDS = st.integers(0, 1 << 32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    take_small_steps(monkeypatch)


class StoreMachine(RuleBasedStateMachine):
    """Random operations on a `StoreRig`. What is random within a rule comes from its seed."""

    steps_done = 0

    def __init__(self) -> None:
        super().__init__()
        self.rig = StoreRig()
        self.reads: list[tuple[Any, Any, Any]] = []  # (request, steps, right answer)

    def requests(self, seed: int) -> Requests:
        StoreMachine.steps_done += 1
        requests = Requests(random.Random(seed))
        requests.revision = self.rig.model.revision
        requests.compacted = self.rig.model.compacted
        return requests

    @rule(seed=SEEDS)
    def write(self, seed: int) -> None:
        requests = self.requests(seed)
        drawn = [requests.write() for _ in range(requests.rng.choice((1, 1, 1, 3)))]
        self.rig.apply(*filter(is_valid, drawn))

    @rule(seed=SEEDS)
    def write_more(self, seed: int) -> None:
        self.write(seed)

    @rule(seed=SEEDS)
    def read(self, seed: int) -> None:
        requests = self.requests(seed)
        for _ in range(3):
            request = requests.range()
            right = outcome(lambda request=request: self.rig.model.range(request))
            answer = outcome(lambda request=request: finish(self.rig.store.range_steps(request)))
            assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"

    @precondition(lambda self: len(self.reads) < 4)
    @rule(seed=SEEDS)
    def begin_a_long_read(self, seed: int) -> None:
        requests = self.requests(seed)
        kind = requests.rng.choice(("range", "txn", "hash"))
        store, model = self.rig.store, self.rig.model
        request: Any
        if kind == "range":
            request = requests.range()
            steps = store.range_steps(request)
            right = outcome(lambda: model.range(request))
        elif kind == "txn":
            request = requests.read_only_txn()
            steps = txn.txn_steps(store, request)
            right = outcome(lambda: model.txn(request))
        else:
            request = requests.rng.randint(max(1, model.compacted), model.revision)
            steps = store.hash_steps(request)
            right = model.hash(request)
        self.reads.append((request, steps, right))
        self.go_on_reading(len(self.reads) - 1)

    def go_on_reading(self, at: int) -> None:
        request, steps, right = self.reads[at]
        try:
            next(steps)
        except StopIteration as done:
            answer = done.value
        except EtcdError as failure:
            answer = failure.text
        else:
            return
        del self.reads[at]
        if answer == "etcdserver: mvcc: required revision has been compacted":
            # A transaction may find that a revision it names was compacted after it began.
            assert answer == right or type(request) is proto.TxnRequest
        else:
            assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"

    @precondition(lambda self: self.reads)
    @rule(seed=SEEDS)
    def continue_a_read(self, seed: int) -> None:
        requests = self.requests(seed)
        self.go_on_reading(requests.rng.randrange(len(self.reads)))

    @precondition(lambda self: self.reads)
    @rule(seed=SEEDS)
    def give_up_a_read(self, seed: int) -> None:
        requests = self.requests(seed)
        _, steps, _ = self.reads.pop(requests.rng.randrange(len(self.reads)))
        steps.close()

    @precondition(lambda self: self.rig.store.compaction and not self.rig.store.compaction_is_held)
    @rule(seed=SEEDS)
    def go_on_compacting(self, seed: int) -> None:
        self.requests(seed)
        self.rig.store.compact_step()

    @precondition(lambda self: self.rig.job is None)
    @rule(seed=SEEDS)
    def begin_a_checkpoint(self, seed: int) -> None:
        self.requests(seed)
        self.rig.begin_checkpoint()

    @precondition(lambda self: self.rig.job is None and self.rig.cleanable())
    @rule(seed=SEEDS)
    def begin_cleaning(self, seed: int) -> None:
        requests = self.requests(seed)
        self.rig.begin_cleaning(requests.rng.choice(self.rig.cleanable()))

    @precondition(lambda self: self.rig.job is not None)
    @rule(seed=SEEDS)
    def go_on_with_the_job(self, seed: int) -> None:
        requests = self.requests(seed)
        for _ in range(requests.rng.choice((1, 2, 20))):
            if self.rig.job is not None:
                self.rig.advance()

    @precondition(lambda self: self.rig.job is None)
    @rule(seed=SEEDS)
    def defragment(self, seed: int) -> None:
        self.requests(seed)
        self.rig.store.data.roll()
        self.rig.checkpoint()
        self.rig.clean_all()
        self.check(seed)

    @rule(seed=SEEDS)
    def restart(self, seed: int) -> None:
        requests = self.requests(seed)
        self.reads.clear()
        how = requests.rng.randrange(4)
        if how == 0:
            self.rig.lose_power()
        elif how == 1:
            self.rig.lose_power(requests.rng)
        else:
            self.rig.restart()
        self.rig.check()

    @rule(seed=SEEDS)
    def check(self, seed: int) -> None:
        requests = self.requests(seed)
        self.rig.check(requests.rng)

    def teardown(self) -> None:
        self.rig.check()


def is_valid(request: Any) -> bool:
    """Whether the front door lets a request in."""
    if type(request) is not proto.TxnRequest:
        return True
    try:
        txn.check_txn(request, 128)
    except EtcdError:
        return False
    return True


def run_machine(examples: int, steps: int) -> int:
    StoreMachine.steps_done = 0
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return StoreMachine.steps_done


def test_ten_thousand_random_operations_agree_with_a_plain_model() -> None:
    assert run_machine(examples=110, steps=100) >= 10_000
