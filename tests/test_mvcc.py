"""The store against a plain model of it: every operation, every interleaving, every crash."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)
from plain_model import Requests
from store_rig import StoreRig, finish, outcome, take_small_steps

from etcdlite import proto, txn
from etcdlite.errors import EtcdError, error

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
        self.step = 0

    @rule(seed=SEEDS, count=st.integers(10, 60))
    def live(self, seed: int, count: int) -> None:
        """Writes and reads, with long work going on beside them."""
        rng = random.Random(f"{seed} {self.step}")
        acts, shares = zip(*self.DAY, strict=True)
        for act in rng.choices(acts, shares, k=count):
            act(self, Requests(rng, self.rig.model.revision, self.rig.model.compacted))
            self.step += 1
            StoreMachine.steps_done += 1

    @rule(seed=SEEDS, kind=st.sampled_from(("killed", "all lost", "some lost")))
    def end_and_begin_again(self, seed: int, kind: str) -> None:
        for _, steps, _ in self.reads:
            steps.close()
        self.reads.clear()
        if kind == "killed":
            self.rig.restart()
        elif kind == "all lost":
            self.rig.lose_power()
        else:
            self.rig.lose_power(random.Random(f"{seed} {self.step}"))
        self.rig.check()

    @rule(cleaned=st.booleans())
    def defragment(self, cleaned: bool) -> None:
        self.rig.finish_job()
        self.rig.store.data.roll()
        self.rig.checkpoint()
        if cleaned:
            self.rig.clean_all()
        self.rig.check(random.Random(self.step))

    def write(self, requests: Requests) -> None:
        drawn = [requests.write() for _ in range(requests.rng.choice((1, 1, 1, 3)))]
        self.rig.apply(*filter(is_valid, drawn))

    def read(self, requests: Requests) -> None:
        request = requests.range()
        right = outcome(lambda: self.rig.model.range(request))
        answer = outcome(lambda: finish(self.rig.store.range_steps(request)))
        assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"

    def begin_a_long_read(self, requests: Requests) -> None:
        if len(self.reads) == 4:
            return
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

    def continue_a_read(self, requests: Requests) -> None:
        if self.reads:
            self.go_on_reading(requests.rng.randrange(len(self.reads)))

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
        if answer == error("Compacted").text:
            # A transaction may find that a revision it names was compacted after it began.
            assert answer == right or type(request) is proto.TxnRequest
        else:
            assert answer == right, f"{request}\n is answered {answer!r}\n instead of {right!r}"

    def give_up_a_read(self, requests: Requests) -> None:
        if self.reads:
            _, steps, _ = self.reads.pop(requests.rng.randrange(len(self.reads)))
            steps.close()

    def go_on_compacting(self, requests: Requests) -> None:
        if self.rig.store.compaction is not None and not self.rig.store.compaction_is_held:
            self.rig.store.compact_step()

    def begin_a_checkpoint(self, requests: Requests) -> None:
        if self.rig.job is None:
            self.rig.begin_checkpoint()

    def begin_cleaning(self, requests: Requests) -> None:
        if self.rig.job is None and self.rig.cleanable():
            self.rig.begin_cleaning(requests.rng.choice(self.rig.cleanable()))

    def go_on_with_the_job(self, requests: Requests) -> None:
        for _ in range(requests.rng.choice((1, 1, 2, 20))):
            if self.rig.job is not None:
                self.rig.advance()

    def check(self, requests: Requests) -> None:
        self.rig.check(requests.rng)

    DAY = (
        (write, 40),
        (read, 15),
        (begin_a_long_read, 5),
        (continue_a_read, 10),
        (give_up_a_read, 1),
        (go_on_compacting, 5),
        (begin_a_checkpoint, 3),
        (begin_cleaning, 4),
        (go_on_with_the_job, 15),
        (check, 2),
    )

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
            phases=(Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return StoreMachine.steps_done


def test_fifty_thousand_random_operations_agree_with_a_plain_model() -> None:
    assert run_machine(examples=300, steps=30) >= 50_000
