"""What other work does to a run on a CPU.

PyTorch's threads wait for each other after every operation. If other work holds one core, all wait
for the thread that had to share it, so two runs on two cores are each slower than half as fast
(`docs/log.md` has numbers). A user who sees that in the plan can wait, or give each run its own
cores.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

STAT = Path("/proc/stat")
SECONDS = 0.2


def busy_cores(seconds: float = SECONDS) -> float | None:
    """Return how many of this process's cores are at work while it sleeps; None if not known.

    Linux only.
    """
    if not STAT.exists():
        return None
    cores = os.sched_getaffinity(0)
    before = _times(STAT.read_text().splitlines(), cores)
    time.sleep(seconds)
    after = _times(STAT.read_text().splitlines(), cores)
    idle, total = (now - then for now, then in zip(after, before, strict=True))
    return len(cores) * (1 - idle / total) if total > 0 else None


def _times(lines: Iterable[str], cores: set[int]) -> tuple[int, int]:
    """Return the idle and all ticks of some cores since the machine started.

    >>> lines = ["cpu  9 0 9 9 9", "cpu0 50 0 10 30 10 0 0", "cpu1 100 0 0 0 0 0 0", "intr 7"]
    >>> _times(lines, {0}), _times(lines, {0, 1})
    ((40, 100), (40, 200))
    """
    idle = total = 0
    for line in lines:
        name, *ticks = line.split()
        if name in {f"cpu{core}" for core in cores}:
            # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in user.
            numbers = [int(each) for each in ticks[:8]]
            idle += numbers[3] + numbers[4]
            total += sum(numbers)
    return idle, total
