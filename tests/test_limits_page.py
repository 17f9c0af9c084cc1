"""docs/limits.md names what exists, and leaves no limit out."""

from __future__ import annotations

import importlib
import re

from rigs.processes import ROOT

from etcdlite import flags
from etcdlite.limits import Limits

PAGE = (ROOT / "docs" / "limits.md").read_text()
NAMES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)
FIELDS = set(Limits._fields)
FLAGS = {flag.name for group in flags.GROUPS.values() for flag in group}


def test_every_limit_on_the_page_exists() -> None:
    assert len(NAMES) > 40
    for name in NAMES:
        module, _, constant = name.rpartition(".")
        if module:
            assert isinstance(
                getattr(importlib.import_module(f"etcdlite.{module}"), constant), (int, float)
            )
        else:
            assert name in FIELDS | FLAGS, name


def test_every_limit_that_refuses_is_on_the_page() -> None:
    refusing = {name for name in FIELDS | FLAGS if name.startswith(("max_", "max-"))}
    refusing -= {"max-learners", "max-snapshots", "max-wals"}
    assert refusing <= set(NAMES), refusing - set(NAMES)
