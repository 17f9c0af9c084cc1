"""The clock of this machine, which anybody may set."""

import time


def unix_s() -> float:
    """Seconds since 1970; 0 before. Python can tell no time after April 2262, so this cannot."""
    try:
        return max(0.0, time.time())
    except OverflowError:
        return 9_223_372_036.0
