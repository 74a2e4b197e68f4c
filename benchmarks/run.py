"""Measure the speed of parts on this machine, most next to another library; `make bench`.

    python benchmarks/run.py --only views,text --repeats 7 --json bench.json

The sides take turns within one process (A B A B …); the numbers are medians, and nothing is asserted about them. They
hold for the machine, its load and the threads that are printed with them.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from declip.errors import unknown
from machine import machine

PARTS = {
    "views": "two augmented views of an image",
    "text": "tokenizing and EDA",
    "loader": "batches from files",
    "lookup": "the nearest neighbor among earlier texts",
    "contrast": "the contrastive loss",
    "step": "a full-size training step, on 4 pairs",
    "demo": "a demo-size training step with its loading",
    "growth": "a step and a table as they grow",
}
"""Parts to measure: each is a file of that name with a function `measure`."""

RATIOS = {"times_ours": "× ours", "times_clip": "× clip", "times_open_clip": "× open_clip"}


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    parser.add_argument("--only", help=f"parts, separated by commas. {known}. Default: all")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each, at least 1 (default 7)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--wordnet", type=Path, help="folder with WordNet's files, for textaugment; see text.py")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give 1 or more")
    found = {name: part(name) for name in (options.only.split(",") if options.only else present())}
    if missing := [name for name, module in found.items() if module is None]:
        parser.error(str(unknown("part", missing[0], present())))
    result = {"machine": machine(), "repeats": options.repeats, "rows": []}
    for name, module in found.items():
        more = {"wordnet": options.wordnet} if name == "text" else {}
        result["rows"] += module.measure(options.repeats, **more)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, Console(stderr=True))
    print(json.dumps(result))


def present() -> list[str]:
    """Names of the parts whose files are here."""
    return [name for name in PARTS if Path(__file__).with_name(f"{name}.py").is_file()]


def part(name: str) -> ModuleType | None:
    """Import the module that measures a part; None where there is none."""
    return import_module(name) if name in present() else None


def show(result: dict, console: Console) -> None:
    """Print a table row per measurement, and the notes."""
    about = result["machine"]
    table = Table("part", "what", "µs each", "a second", "time", title="Medians")
    notes = [f"{found['part']}: {found['note']}." for found in result["rows"] if "note" in found]
    for found in result["rows"]:
        if "note" not in found:
            said = [f"{found[key]:.2f} {sign}" for key, sign in RATIOS.items() if key in found]
            if "loading_fraction" in found:
                said.append(f"{found['loading_fraction']:.0%} loading")
            rate = f"{found['per_second']:,.0f} {found['unit']}"
            table.add_row(found["part"], found["what"], f"{found['microseconds_each']:,.1f}", rate, ", ".join(said))
    console.print(table, *notes, sep="\n")
    console.print(
        f"{about['processor']}, {about['cores']} cores; threads: {about['threads']} for the steps, 1 for the views; "
        f"load {about['load_before']} before; {result['repeats']} turns each; {about['date']}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
