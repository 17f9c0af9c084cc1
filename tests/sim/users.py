"""The users of a simulation, and the administrator who changes what they may do.

Seeds from `OLD_SEEDS` on have users with a share of `USERS_SHARE`, drawn beside everything else, so
that all other traces stay as they are. Any seed has them if asked: `python -m tests.sim --users`.
"""

from __future__ import annotations

import random
from typing import Any

from sim.changes import USERS, change, founding
from sim.checkers import Oracle
from sim.client import Client, Load
from sim.faults import OLD_SEEDS
from sim.world import EPOCH_S, World

USERS_SHARE = 0.3

FOUNDING_S = 0.05
"""Between two changes before auth is enabled for the first time."""
FOUNDING_SHARE = 0.4
"""Of the changes later, those that lead back to a cluster with users."""

LOAD = {"auth_read": 2.0, "change_auth": 1.0}
"""What clients do besides, in the weights of `Load`."""


def has_users(seed: int) -> bool:
    return seed >= OLD_SEEDS and random.Random(f"{seed} users").random() < USERS_SHARE


class Administrator:
    """Makes users, roles and permissions, enables auth, and then changes all of it now and then."""

    def __init__(self, world: World, oracle: Oracle, load: Load, clients: list[Client]) -> None:
        self.is_active = True
        self.changes = 0
        self._world = world
        self._oracle = oracle
        self._load = load
        self._rng = rng = random.Random(f"{world.seed} administrator")
        world.token_ttl_s = rng.choice((2.0, 10.0, 300.0))
        self._was_enabled = False
        self._pause_s = rng.choice((0.1, 0.4, 1.0))
        oracle.wall_clock_s = EPOCH_S
        self._client = Client(world, oracle, load, "root")
        self._client.is_busy = False
        for name, weight in LOAD.items():
            load.weights.setdefault(name, weight)
        load.settle()
        self.log_in(self._client, "root")
        for client in clients:
            self.log_in(client, rng.choice((*USERS, *USERS[1:], "")))

    def log_in(self, client: Client, name: str) -> None:
        """Have a client be that user."""
        client.user = name
        client.passwords = self._oracle.password_of

    def start(self) -> None:
        self._client.start()
        self._world.at(FOUNDING_S, self._act)

    def _act(self) -> None:
        rng, oracle, client = self._rng, self._oracle, self._client
        self._was_enabled |= oracle.auth.now.enabled
        pause_s = self._pause_s if self._was_enabled else FOUNDING_S
        self._world.at(rng.expovariate(1.0 / pause_s), self._act)
        if not self.is_active:
            return
        begun: tuple[str, Any] | None = None
        if not self._was_enabled or rng.random() < FOUNDING_SHARE:
            begun = founding(rng, oracle, self._load.keys)
        name, request = begun or change(rng, oracle, self._load.keys)
        if client.ask(name, request, is_write=True) is not None:
            self.changes += 1
        client.flush()
