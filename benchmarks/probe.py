"""Measure the linear probe's solver against scikit-learn's on this machine.

    python benchmarks/probe.py --rows 50000 --width 1024 --classes 100 --threads 1

All minimize the same objective with the same C on the same float32 features, and all must come as near to the
minimum: of the tolerances 1e-2, 1e-3 … each gets the loosest one with which it does. They take turns within one
process (A B C A B C …); the numbers are medians and hold for the machine, its load and the threads printed next to
them. Centering moves no minimum, since the bias is free, and a user of scikit-learn can do it in one line. The last
line is JSON.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from declip.evaluation.probes.logistic import Classifier, LogisticProblem
from machine import machine
from timing import row, take_turns

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
MOST_ITERATIONS = 5000
OURS, PEER, CENTRED_PEER = "declip", "scikit-learn", "scikit-learn, features centered first"


def make_features(rows: int, width: int, classes: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes as clouds in a space whose directions shrink as those of a network's features do, off the origin.

    The k-th direction's deviation is k ** -0.7, rotated at random; `noise` is the clouds' width over the distance
    of their centers.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, width + 1).float() ** -0.7
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    labels = torch.randint(classes, (rows,), generator=generator)
    centers = torch.randn(classes, width, generator=generator) * spread
    clouds = centers[labels] + noise * torch.randn(rows, width, generator=generator) * spread
    return clouds @ turn + 0.5 * torch.randn(width, generator=generator), labels


def objective(features: torch.Tensor, labels: torch.Tensor, found: Classifier, C: float) -> float:
    """The mean loss with its penalty, in float64."""
    parts = zip(features.split(4096), labels.split(4096), strict=True)
    loss = sum(found.measure(rows.double(), own)[1] * len(own) for rows, own in parts) / len(labels)
    return loss + float(found.weight.square().sum()) / (2 * C * len(labels))


def ours(features: torch.Tensor, labels: torch.Tensor, C: float, tolerance: float) -> Classifier:
    """Prepare and fit."""
    return LogisticProblem(features, labels).fit(C, tolerance=tolerance, max_iterations=MOST_ITERATIONS)


def theirs(features: torch.Tensor, labels: torch.Tensor, C: float, tolerance: float) -> Classifier:
    """Fit by scikit-learn's L-BFGS on the same float32 array."""
    model = LogisticRegression(C=C, tol=tolerance, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.numpy(), labels.numpy())
    weight, bias, present = (torch.from_numpy(np.asarray(x)) for x in (model.coef_, model.intercept_, model.classes_))
    return Classifier(weight.double(), bias.double(), present, C, int(model.n_iter_[0]), True)


def theirs_centered(features: torch.Tensor, labels: torch.Tensor, C: float, tolerance: float) -> Classifier:
    """The same after subtracting the mean, which the bias takes back."""
    mean = features.mean(0)
    found = theirs(features - mean, labels, C, tolerance)
    return replace(found, bias=found.bias - found.weight @ mean.double())


def loosest(fit: Callable[[float], Classifier], value: Callable[[Classifier], float], limit: float) -> dict[str, float]:
    """The loosest tolerance with which a solver gets below a limit, or its best if none does."""
    tried = []
    for tolerance in TOLERANCES:
        found = fit(tolerance)
        tried.append({"tolerance": tolerance, "objective": value(found), "iterations": found.iterations})
        if tried[-1]["objective"] <= limit:
            return tried[-1]
    return min(tried, key=lambda one: one["objective"])


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Time all for each C alone, and for all C in a row, as a sweep has them."""
    features, labels = make_features(options.rows, options.width, options.classes, options.noise)
    exact = LogisticProblem(features, labels, dtype=torch.float64)
    rows, tolerances = [], {name: {} for name in SOLVERS}
    for C in options.C:
        best = exact.fit(C, tolerance=1e-5, max_iterations=MOST_ITERATIONS)
        minimum = objective(features, labels, best, C)
        tasks, reached = {}, {}
        for name, solve in SOLVERS.items():
            fit = partial(solve, features, labels, C)
            reached[name] = loosest(fit, partial(objective, features, labels, C=C), minimum * (1 + options.gap))
            tolerances[name][C] = reached[name]["tolerance"]
            tasks[name] = partial(fit, tolerances[name][C])
        seconds = take_turns(options.repeats, tasks)
        for name in SOLVERS:
            gap = reached[name]["objective"] / minimum - 1
            more = {"C": C, "minimum": minimum, "relative_gap": gap, "reached": gap <= options.gap}
            more |= {key: reached[name][key] for key in ("tolerance", "iterations")}
            rows.append(_row(name, seconds, options.rows, **more))
    if len(options.C) > 1:
        paths = {OURS: our_path, PEER: their_path, CENTRED_PEER: partial(their_path, centered=True)}
        tasks = {name: partial(path, features, labels, tolerances[name]) for name, path in paths.items()}
        seconds = take_turns(options.repeats, tasks)
        rows += [_row(name, seconds, options.rows, C="all") for name in SOLVERS]
    return rows


def our_path(features: torch.Tensor, labels: torch.Tensor, tolerances: dict[float, float]) -> None:
    """Prepare once; each fit starts from the one before."""
    problem, found = LogisticProblem(features, labels), None
    for C, tolerance in sorted(tolerances.items()):
        found = problem.fit(C, start=found, tolerance=tolerance, max_iterations=MOST_ITERATIONS)


def their_path(
    features: torch.Tensor, labels: torch.Tensor, tolerances: dict[float, float], centered: bool = False
) -> None:
    """scikit-learn's warm start: each fit starts from the one before."""
    array = (features - features.mean(0) if centered else features).numpy()
    model = LogisticRegression(max_iter=MOST_ITERATIONS, warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for C, tolerance in sorted(tolerances.items()):
            model.set_params(C=C, tol=tolerance).fit(array, labels.numpy())


SOLVERS = {OURS: ours, PEER: theirs, CENTRED_PEER: theirs_centered}


def _row(name: str, seconds: dict[str, float], count: int, **more: object) -> dict[str, object]:
    found = row("linear probe", name, seconds[name], count, "images", seconds_a_fit=round(seconds[name], 3), **more)
    return found if name == OURS else found | {"times_ours": round(seconds[name] / seconds[OURS], 2)}


def main() -> None:
    """Measure, show a table, and print the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000, help="images (default 50,000)")
    parser.add_argument("--width", type=int, default=1024, help="numbers in a feature (default 1,024)")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--noise", type=float, default=2.0, help="width of a class over the distance between them")
    parser.add_argument("--C", type=float, nargs="+", default=[0.0001, 0.01, 1.0, 100.0], help="one or more")
    parser.add_argument("--gap", type=float, default=1e-4, help="largest objective over the minimum, minus 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default 3)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        result = {**vars(options), "machine": machine(), "part": "linear probe", "result": measure(options)}
    table = Table("C", "what", "seconds", "iterations", "over the minimum", "time", title="Medians")
    for found in result["result"]:
        time = f"{found['times_ours']:.2f} × ours" if "times_ours" in found else ""
        gap, iterations = "", ""
        if "reached" in found:
            gap = f"{found['relative_gap']:.1e}" + ("" if found["reached"] else " (not reached)")
            iterations = str(found["iterations"])
        table.add_row(str(found["C"]), found["what"], f"{found['seconds_a_fit']:.2f}", iterations, gap, time)
    size = f"{options.rows:,} x {options.width:,}, {options.classes} classes, threads: {options.threads}"
    Console().print(table, f"{size}; load {result['machine']['load_before']} before", sep="\n", highlight=False)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
