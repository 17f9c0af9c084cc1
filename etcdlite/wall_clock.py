"""The clock of this machine, which anybody may set."""

import time

LAST_S = 9_223_372_036
"""Python can tell no time after this one, in April 2262."""


def unix_s() -> float:
    """Seconds since 1970, from 0 to `LAST_S` also while the clock is set to a time before or after:
    what stores a time has no place for others."""
    try:
        return max(0.0, time.time())
    except OverflowError:
        return float(LAST_S)
