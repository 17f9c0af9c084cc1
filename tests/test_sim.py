"""The simulator: a fixed set of seeds and a few fresh ones; that it is deterministic; that it finds
deliberate bugs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sim.checkers import Violation
from sim.mutations import MIXED_VERSIONS, MOST_SEEDS, MUTATIONS, Mutation, Patch, hunt, prepare
from sim.simulation import Failure, Simulation, fresh_seed

from etcdlite.secret_file import Secret

QUICK = (
    "ack before commit",
    "applied index is not recovered",
    "forwarded writes are sent twice",
    "follower reads without asking",
    "learners count for a commit",
    "compaction takes too much",
    "checksums are not looked at",
    "compare of a range looks at its first key only",
    "damage is handed on in snapshots",
    "snapshot is not marked in the log",
    "log is released too early",
    "watch does not start at its revision",
    "permissions that touch do not count together",
    "a lease is revoked whoever owns its keys",
    "previous values are told to those who may only write",
    "users of a snapshot are not taken",
    "the cluster version rises too early",
)
"""Mutations that are found within seconds."""

QUICK_SEEDS = 5


def simulate(seed: int, minutes: float) -> Simulation:
    simulation = Simulation(seed)
    try:
        simulation.run(minutes)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)
    return simulation


@pytest.mark.parametrize("seed", [0, 2, 6, 10, 12, 14])
def test_a_known_seed_finds_nothing(seed: int) -> None:
    simulate(seed, 0.1)


def test_a_fresh_seed_finds_nothing() -> None:
    for _ in range(3):
        simulate(fresh_seed(), 0.1)


@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 60))]
)
def test_members_with_a_shared_secret_are_a_cluster_like_any_other(seed: int) -> None:
    """With all faults, and bits that flip in the ciphertext."""
    simulation = prepare(Mutation("", _nothing, {"flip_bits": 100.0}, mean_pause_s=0.5), seed)
    simulation.world.secret = (Secret(bytes(range(100, 132))),)
    try:
        simulation.run(0.2)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)
    assert simulation.nemesis.counts["flip_bits"] > 1
    assert any("is not authentic" in line for _, line in simulation.world.lines)


@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 60))]
)
def test_bits_that_flip_between_members_change_nothing(seed: int) -> None:
    simulation = prepare(Mutation("", _nothing, {"flip_bits": 100.0}, mean_pause_s=0.3), seed)
    try:
        simulation.run(0.2)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)
    assert simulation.nemesis.counts["flip_bits"] > 1


@pytest.mark.parametrize(
    "seed", [2, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 60))]
)
def test_a_leader_whose_data_is_damaged_is_replaced(seed: int) -> None:
    """It cannot send a snapshot to the members that need one, which its own removal may need."""
    try:
        prepare(MUTATIONS["damage is handed on in snapshots"], seed).run(0.25)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)


@pytest.mark.parametrize(
    "seed", [2, 3, *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 60))]
)
def test_users_whose_rights_change_may_do_what_the_rules_say(seed: int) -> None:
    simulation = Simulation(seed)
    simulation.has_users = True
    try:
        simulation.run(0.1)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)
    assert simulation.administrator is not None and simulation.administrator.changes
    assert simulation.oracle.auth.latest > 1


@pytest.mark.parametrize(
    "seed", [1, 2, 3, *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 60))]
)
def test_members_of_two_versions_are_a_cluster_like_any_other(seed: int) -> None:
    simulation = prepare(MIXED_VERSIONS, seed)
    try:
        simulation.run(0.3)
    except Failure as failure:
        pytest.fail(str(failure), pytrace=False)
    assert simulation.nemesis.counts["upgrade"] > 1


def test_the_same_seed_with_users_twice_gives_the_same_trace() -> None:
    digests = set()
    for _ in range(2):
        simulation = Simulation(2)
        simulation.has_users = True
        simulation.run(0.1)
        digests.add(simulation.world.digest)
    assert len(digests) == 1


def _nothing(patch: Patch) -> None:
    """No deliberate bug."""


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    """In processes of their own, because a process has one hash seed."""
    digests = set()
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "4", "--minutes", "0.1"],
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        digests.add(run.stdout.split("trace hash ")[1].strip())
    assert len(digests) == 1


def test_the_same_seed_twice_in_one_process_gives_the_same_trace() -> None:
    for seed in (3, 5):
        assert simulate(seed, 0.1).world.digest == simulate(seed, 0.1).world.digest


def test_a_member_whose_revision_is_behind_at_its_place_in_the_log_is_found() -> None:
    """Its hash is that of the others at an earlier revision, so only the place shows it."""
    simulation = Simulation(3, members=3)
    simulation.run(0.05)
    store = simulation.world.nodes["m2"].member.state.store
    simulation._compare_hashes()
    store.revision -= 1
    with pytest.raises(Violation, match="equal revisions at equal places of the log"):
        simulation._compare_hashes()


def test_a_failure_says_what_is_wrong_and_how_to_see_it_again() -> None:
    from sim.mutations import switched_on

    mutation = MUTATIONS["ack before commit"]
    simulation = prepare(mutation, 1)
    with switched_on(mutation), pytest.raises(Failure) as caught:
        simulation.run(0.1)
    text = str(caught.value)
    assert text.startswith("seed 1 fails at ")
    assert "violated: a write is answered only when it is committed" in text
    assert "  python -m tests.sim --seed 1 --members 3 --minutes 0.1 --trace out.txt" in text


def test_all_deliberate_bugs_fit_what_they_replace() -> None:
    from sim.mutations import switched_on

    for mutation in MUTATIONS.values():
        with switched_on(mutation):
            pass


@pytest.mark.parametrize("name", QUICK)
def test_a_deliberate_bug_is_found(name: str) -> None:
    seeds, _ = hunt(MUTATIONS[name], QUICK_SEEDS)
    assert seeds, f"{QUICK_SEEDS} seeds did not find it"


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_deliberate_bug_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(MUTATIONS) >= 25
    missed = []
    for name, mutation in MUTATIONS.items():
        seeds, claim = hunt(mutation, MOST_SEEDS)
        with capsys.disabled():
            print(f"\n{name:52} {seeds or 'none':>5}  {claim}", end="")
        if not seeds:
            missed.append(name)
    assert not missed


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_fresh_seeds_find_nothing() -> None:
    for _ in range(300):
        simulate(fresh_seed(), 0.3)
