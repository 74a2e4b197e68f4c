"""Median time to start declip: its import, its help, and a search in a new process.

    python benchmarks/start.py INDEX > start.json

Processor seconds do not depend on other work on the machine. Those of Python alone are included.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

from timing import machine

REPEATS = 5
COMMANDS = {
    "python": ["-c", "pass"],
    "import declip": ["-c", "import declip"],
    "help": ["-m", "declip", "--help"],
}


def seconds_of(words: list[str]) -> tuple[float, float]:
    """Processor seconds and seconds of a Python process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        time.perf_counter() - start,
    )


def main() -> None:
    """Measure, and print the numbers as JSON; without an index, no search."""
    rows, index = [], sys.argv[1:2]
    search = {"search": ["-m", "declip", "search", *index, "a red ball"]} if index else {}
    for what, words in {**COMMANDS, **search}.items():
        processor, passed = map(
            statistics.median, zip(*(seconds_of(words) for _ in range(REPEATS)), strict=True)
        )
        rows.append({"what": what, "processor_s": round(processor, 3), "s": round(passed, 3)})
    print(json.dumps({"machine": machine(), "repeats": REPEATS, "rows": rows}))


if __name__ == "__main__":
    main()
