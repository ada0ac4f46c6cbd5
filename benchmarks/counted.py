"""How far a benchmark is: no thread draws this, which would disturb what is timed."""

import sys
import time
from collections.abc import Iterator


def counted(rounds: int, what: str = "round") -> Iterator[int]:
    """Counts from 0, and says on stderr which round it is and how long the rest takes."""
    started = time.perf_counter()
    for number in range(rounds):
        left = ""
        if number:
            seconds = (time.perf_counter() - started) / number * (rounds - number)
            left = f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"
        print(f"{what} {number + 1} of {rounds}{left}", file=sys.stderr, flush=True)
        yield number
