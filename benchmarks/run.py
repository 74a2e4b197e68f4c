"""Measure views, tokeniser and step on this machine; `make bench`.

    python benchmarks/run.py --repeats 7 --json bench.json

What is compared takes turns within one process (A B A B …); the numbers are medians, and nothing is asserted about
them. They hold for the machine, its load and the threads that are printed beside them.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import step
import text
import views

PACKAGES = ("torch", "torchvision", "timm", "tokenizers", "open_clip_torch")


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="turns of each, at least 1 (default 7)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give 1 or more")
    result = {"machine": machine(), "repeats": options.repeats, "rows": []}
    for part in (views, text, step):
        result["rows"] += part.measure(options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, Console())
    print(json.dumps(result))


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(result: dict, console: Console) -> None:
    """A row for each measurement, and what it is compared with."""
    about = result["machine"]
    table = Table("part", "what", "µs each", "a second", "time", title="Medians")
    notes = [f"{found['part']}: {found['note']}." for found in result["rows"] if "note" in found]
    for found in result["rows"]:
        if "note" not in found:
            said = [f"{found[key]:.2f} {sign}" for key, sign in RATIOS.items() if key in found]
            if "loading_share" in found:
                said.append(f"{found['loading_share']:.0%} loading")
            rate = f"{found['per_second']:,.0f} {found['unit']}"
            table.add_row(found["part"], found["what"], f"{found['microseconds_each']:,.1f}", rate, ", ".join(said))
    console.print(table, *notes, sep="\n")
    console.print(
        f"{about['processor']}, {about['cores']} cores; threads: {about['threads']} for the step, 1 for the views; "
        f"load {about['load_before']} before; {result['repeats']} turns each; {about['date']}",
        highlight=False,
    )


RATIOS = {"times_ours": "× ours", "times_clip": "× clip"}


if __name__ == "__main__":
    main()
