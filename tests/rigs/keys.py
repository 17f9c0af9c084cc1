"""Encryption keys for tests, the same in every run."""

from __future__ import annotations

import random

import pytest

from etcdlite.sealing import Key, Keyring


def keyring(*seeds: int) -> Keyring:
    """A key of each seed; the first writes. Nonces are the same in every run, too."""
    pytest.importorskip("nacl", reason="pynacl is not installed")
    rng = random.Random(seeds[0])
    return Keyring([Key(random.Random(seed).randbytes(32), rng.randbytes) for seed in seeds])
