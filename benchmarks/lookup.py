"""Nearest neighbors of a batch's captions in the queue, against lightly's memory bank.

    pip install lightly --no-deps
    python benchmarks/lookup.py --batch-size 128 512 --json lookup.json

DeCLIP's step looks up two text views. Ours makes one product of both. The authors' step makes three of one view each
(both views, and the first again while it is written); that is measured with our queue, and with lightly's
`NNMemoryBankModule`, which like theirs copies and normalizes the bank at each call. All take turns within one process;
the numbers are medians, and without lightly its rows are a note. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from declip.supervision.nearest_neighbor import Queue
from machine import machine
from timing import row, take_turns

SIZE, WIDTH = 65_536, 512
OURS, THREE = "Queue", "Queue, three lookups"
PEER, PEER_THREE = "lightly, one lookup", "lightly, three lookups"


def compare(batch: int, size: int, width: int, repeats: int) -> list[dict[str, object]]:
    """Look up two views of a batch's captions."""
    generator = torch.Generator().manual_seed(0)
    queue = Queue(size, width)
    queue.push(torch.randn(size, width, generator=generator))
    views = F.normalize(torch.randn(2, batch, width, generator=generator), dim=-1)
    both = views.flatten(0, 1)
    thrice = (views[0], views[1], views[0])
    tasks: dict[str, Callable[[], object]] = {
        OURS: lambda: queue.nearest(both),
        THREE: lambda: [queue.nearest(each) for each in thrice],
    }
    notes: list[dict[str, object]] = []
    best, _ = queue.nearest(both)
    try:
        from lightly.models.modules import NNMemoryBankModule
    except ImportError:
        note = "lightly can't be imported (pip install lightly), so there is no peer to compare with"
        notes.append({"part": "lookup", "note": note})
    else:
        bank = NNMemoryBankModule(size=(size, width))
        bank.bank.copy_(queue.features)
        assert (bank(both) == best).all(1).float().mean() > 0.99, "other neighbors"
        tasks |= {PEER: lambda: bank(both), PEER_THREE: lambda: [bank(each) for each in thrice]}
    seconds = take_turns(repeats, tasks)
    rows: list[dict[str, object]] = []
    for name in tasks:
        found = row("lookup", name, seconds[name], 2 * batch, "captions", batch=batch, size=size, width=width)
        rows.append({**found, "seconds_a_step": round(seconds[name], 4)})
        if name != OURS:
            rows[-1]["times_ours"] = round(seconds[name] / seconds[OURS], 2)
        if name in (PEER, PEER_THREE):
            rows[-1]["version"] = version("lightly")
    return rows + notes


def measure(repeats: int) -> list[dict[str, object]]:
    """128 pairs in a queue of the published size: for `run.py`."""
    return compare(128, SIZE, WIDTH, repeats)


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 512], help="pairs, of two captions each")
    parser.add_argument("--size", type=int, default=SIZE, help="of the queue")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "repeats": options.repeats, "rows": []}
    for batch in options.batch_size:
        result["rows"] += compare(batch, options.size, options.width, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("pairs", "what", "seconds a step", "time", title="Medians")
    for found in result["rows"]:
        if "note" not in found:
            ratio = f"{found['times_ours']:.2f} × ours" if "times_ours" in found else ""
            table.add_row(f"{found['batch']:,}", found["what"], f"{found['seconds_a_step']:.3f}", ratio)
    Console().print(table, *{found["note"] for found in result["rows"] if "note" in found}, sep="\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
