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

from machine import machine

COMMANDS = {"python": ["-c", "pass"], "import declip": ["-c", "import declip"], "help": ["-m", "declip", "--help"]}


def seconds_of(words: list[str]) -> tuple[float, float]:
    """Processor seconds and seconds of a Python process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - start


if __name__ == "__main__":
    rows = []
    for what, words in {**COMMANDS, "search": ["-m", "declip", "search", sys.argv[1], "a red ball"]}.items():
        processor, passed = map(statistics.median, zip(*(seconds_of(words) for _ in range(5)), strict=True))
        rows.append({"what": what, "processor_s": round(processor, 3), "s": round(passed, 3)})
    print(json.dumps({"machine": machine(), "repeats": 5, "rows": rows}))
