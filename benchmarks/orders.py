"""Order of the pairs at 10 million and a billion: start-up, memory, mixing, and a start in the middle.

    python benchmarks/orders.py --pairs 10000000 1000000000 --json

Only the order is made, of shards of 10,000 pairs: 1,000 or 100,000 of them. Each row is measured in a process of its
own. "shards in a batch" tells how well pairs are mixed: a shuffle of all pairs is the ideal.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from declip.data.pair import Span
from declip.data.sampling import BufferedOrder, Order, ShuffledOrder
from memory import added_peak, in_fresh_process

SHARD, BATCH = 10_000, 4096
BUFFERS = {"shuffled": None, "buffered, 50,000": 50_000, "buffered, 1,000,000": 1_000_000}


def make(kind: str, pairs: int) -> Order:
    """An order of a source of shards."""
    spans = [Span(0, np.full(pairs // SHARD, SHARD), pairs)]
    if (buffer := BUFFERS[kind]) is not None:
        return BufferedOrder(spans, pairs, BATCH, 0, buffer)
    return ShuffledOrder(spans, pairs, BATCH, 0)


def measure(kind: str, pairs: int) -> dict[str, Any]:
    """One row."""
    taken: dict[str, Any] = {}

    def work() -> None:
        begun = time.perf_counter()
        order = make(kind, pairs)
        taken["first"] = order.indices(0)
        taken["start"] = time.perf_counter() - begun
        begun = time.perf_counter()
        for step in range(1, 20):
            order.indices(step)
        taken["step"] = (time.perf_counter() - begun) / 19
        taken["middle"] = order.steps_per_epoch // 2 + 3
        taken["there"] = [order.indices(taken["middle"] + number) for number in range(3)]

    added = added_peak(work)
    resumed = make(kind, pairs)
    equal = all(np.array_equal(resumed.indices(taken["middle"] + n), taken["there"][n]) for n in range(3))
    shards = pairs // SHARD
    return {
        "order": kind,
        "pairs": pairs,
        "start_seconds": round(taken["start"], 3),
        "step_ms": round(1e3 * taken["step"], 3),
        "added_mb": round(added / 1e6, 1),
        "shards_in_a_batch": len(np.unique(taken["first"] // SHARD)),
        "shards_of_a_full_shuffle": round(shards * (1 - (1 - 1 / shards) ** BATCH)),
        "resumes_exactly": equal,
    }


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000_000, 1_000_000_000])
    parser.add_argument("--most", type=int, default=100_000_000, help="largest number that is shuffled whole: 8 B each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        in_fresh_process(measure, kind, pairs)
        for pairs in options.pairs
        for kind in BUFFERS
        if pairs <= options.most or kind != "shuffled"
    ]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(stderr=True).print(table)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
