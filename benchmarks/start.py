"""Measure how long declip takes to start: its import, its help, and a search by text in a new process.

    python benchmarks/start.py --index indices/start --json start.json

Processor seconds do not depend on other work on the machine, as seconds do; both are medians, those of Python
alone included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine


def seconds_of(words: list[str]) -> tuple[float, float]:
    """Processor seconds and seconds of a Python process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def main() -> None:
    """Measure, and print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="index to search; none: no search")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    commands = {"python": ["-c", "pass"], "import declip": ["-c", "import declip"], "help": ["-m", "declip", "--help"]}
    if options.index:
        commands["search"] = ["-m", "declip", "search", str(options.index), "a red ball"]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, words in commands.items():
            taken[name].append(seconds_of(words))
    rows = []
    for name, turns in taken.items():
        processor, passed = (round(statistics.median(values), 3) for values in zip(*turns, strict=True))
        rows.append({"what": name, "processor_s": processor, "s": passed})
    text = json.dumps({"machine": machine(), "repeats": options.repeats, "rows": rows})
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
