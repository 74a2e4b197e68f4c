"""Time and memory of InfoNCE, forward and backward, with its loss matrices kept and computed in blocks.

    python benchmarks/contrast.py   # up to 8,192 pairs, minutes
    python benchmarks/contrast.py --batch-size 1024 4096 16384 65536 --all 1024 4096 16384 65536 --repeats 1

`--batch-size` is for one process, whose pairs are all pairs; `--all` for 1,024 own pairs against all processes'.
The two forms take turns within one process and the seconds are medians; memory is what a fresh process's grows by. The
form that keeps its matrices is left out where these would not fit. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from declip.supervision.contrastive import info_nce
from machine import machine
from memory import added_peak, available, in_fresh_process
from timing import row, take_turns

OWN = 1024
FORMS = {"kept": None, "in blocks": 0.0}
PLAIN_MATRICES = 4
"""Of (own, all) float32 that are there at once, backward, in the form that keeps them."""


def make(total: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images and texts, and the logarithm of the scale, all with gradient."""
    generator = torch.Generator().manual_seed(0)
    features = (F.normalize(torch.randn(total, width, generator=generator), dim=1) for _ in range(2))
    images, texts = (x.requires_grad_() for x in features)
    return images, texts, torch.tensor(4.0, requires_grad=True)


def differentiate(form: str, own: int, leaves: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The loss of the first pairs against all, and its gradients."""
    images, texts, log_scale = leaves
    loss = info_nce(images[:own], texts[:own], images, texts, log_scale.exp(), max_logit_bytes=FORMS[form])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def memory(form: str, own: int, total: int, width: int) -> int:
    """Bytes that a loss and its gradients add; the features are there already."""
    differentiate(form, 8, make(64, width))
    leaves = make(total, width)
    return added_peak(lambda: differentiate(form, own, leaves))


def compare(own: int, total: int, width: int, repeats: int) -> list[dict[str, object]]:
    """A row for each form that fits."""
    fits = PLAIN_MATRICES * 4 * own * total < 0.9 * available()
    forms = [form for form in FORMS if fits or FORMS[form] is not None]
    leaves = make(total, width)
    tasks: dict[str, Callable[[], object]] = {form: partial(differentiate, form, own, leaves) for form in forms}
    more: dict[str, object] = {"own": own, "all": total, "width": width}
    if fits:
        expected, found = (differentiate(form, own, leaves) for form in FORMS)
        pairs = zip(found, expected, strict=True)
        more["difference"] = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        del expected, found
    seconds = take_turns(repeats, tasks)
    rows = []
    for form in forms:
        grown = in_fresh_process(memory, form, own, total, width)
        found_row = row("contrast", form, seconds[form], own, "pairs", **more, megabytes=round(grown / 1e6, 1))
        rows.append({**found_row, "seconds_a_step": round(seconds[form], 4)})
    return rows


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch-size", type=int, nargs="*", default=[1024, 2048, 4096, 8192], help="pairs of one process"
    )
    parser.add_argument("--all", type=int, nargs="*", default=[4096, 16384], help="pairs of all, of which 1,024 own")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "repeats": options.repeats, "rows": []}
    for own, total in [*((n, n) for n in options.batch_size), *((OWN, n) for n in options.all)]:
        result["rows"] += compare(own, total, options.width, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("own pairs", "all pairs", "loss matrices", "seconds", "MB", title="Forward and backward, medians")
    for found in result["rows"]:
        numbers = (f"{found['seconds_a_step']:.3f}", f"{found['megabytes']:,.0f}")
        table.add_row(f"{found['own']:,}", f"{found['all']:,}", found["what"], *numbers)
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
