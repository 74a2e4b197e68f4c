"""The commands ``declip train``, ``finetune``, ``evaluate`` and ``compare``."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from declip.cli import options as opt
from declip.cli.options import console, file, known, reads_images, say
from declip.errors import UserError
from declip.io.outputs import STUDY_FILE, check_outputs, result_json, write_output

Task = Literal["zero-shot", "retrieval", "linear", "few-shot"]


def train(
    recipe: Annotated[str, Argument(help="name of a shipped recipe, or a YAML file")],
    overrides: opt.Overrides = None,
    data: Annotated[
        str | None, Option(metavar="SOURCE", help="training pairs; sets the key data.source")
    ] = None,
    val: Annotated[
        opt.Several, opt.source("evaluation set, with classes or captions; repeatable")
    ] = None,
    out: Annotated[
        Path | None, file("run folder; default: runs/NAME, the name of the recipe", metavar="DIR")
    ] = None,
    terms: opt.Terms = None,
    resume: opt.Resume = False,
    progress: opt.Progress = True,
    dry_run: Annotated[bool, Option("--dry-run", help="only estimate memory and time")] = False,
) -> None:
    """Train a model as a recipe describes, evaluate it, and write a report."""
    from declip.recipe.checks import load_for_training
    from declip.recipe.load import parse_overrides
    from declip.runs.existing import check_run_folder

    loaded = load_for_training(recipe, parse_overrides(overrides or []), data, val or (), resume)
    folder = out or Path("runs") / loaded.name
    if not dry_run:
        check_run_folder(folder, resume)
    from declip import api

    if dry_run:
        from declip.training.estimate import estimate

        say(estimate(loaded, api.terms_of(terms)))
        return
    run = api.train(loaded, out=folder, resume=resume, progress=progress, terms=terms)
    leave_unless_finished(run)
    _print_results(run)
    say(f"Report: {run.report}")


def leave_unless_finished(run: Any) -> None:
    """End the command on other ranks than the first, and after a signal with the command that continues."""
    if not run.is_rank_zero:
        raise typer.Exit(0 if run.finished else run.status)
    if not run.finished:
        say(
            f"Stopped after step {run.step:,} of {run.recipe.train.steps:,}; a checkpoint was saved. Continue with:"
        )
        program = "torchrun … -m declip" if "TORCHELASTIC_RUN_ID" in os.environ else "declip"
        say(
            f"  {program} {shlex.join([*(word for word in sys.argv[1:] if word != '--resume'), '--resume'])}"
        )
        raise typer.Exit(run.status)


def _print_measures(run: Any) -> None:
    from declip.reports.page import rich_table
    from declip.reports.run import measures_table

    if run.evaluated:
        console.print(rich_table(measures_table(run)))


def _print_results(run: Any) -> None:
    from declip.io.text import plural

    _print_measures(run)
    seen = run.step * run.recipe.train.batch_size
    speed = run.samples_per_second
    pace = "speed not measured"
    if speed:
        pace = f"{speed:,.0f} samples/s (median)"
    counted = f"{plural(seen, 'sample')} seen in {plural(run.step, 'step')}"
    say(f"{run.recipe.name}, seed {run.recipe.seed}: {counted}, {pace}")
    if not run.evaluated:
        say("Nothing was evaluated: name a held-out set with --val heldout.csv.")


def finetune(
    pairs: opt.Source,
    overrides: opt.Overrides = None,
    weights: Annotated[
        str | None,
        Option(
            "--from",
            metavar="WEIGHTS",
            callback=known,
            help="default without a GPU: builtin:lite2-minilm",
        ),
    ] = None,
    val: Annotated[
        opt.Several,
        opt.source("validation set; default: a tenth of the pairs if towers are trained"),
    ] = None,
    keep: Annotated[
        opt.Several, opt.source("set on which the accuracy should not fall; repeatable")
    ] = None,
    out: Annotated[Path | None, file("run folder; default: runs/finetune", metavar="DIR")] = None,
    freeze: Annotated[
        str | None,
        Option(
            metavar="TOWERS",
            help="both, image, text or none; default: both for built-in weights on a CPU",
        ),
    ] = None,
    resume: opt.Resume = False,
    progress: opt.Progress = True,
) -> None:
    """Fine-tune pretrained weights on your pairs, write a report, and export the model."""
    from declip.finetuning.request import FINETUNED, Request
    from declip.recipe.load import parse_overrides
    from declip.runs.existing import check_run_folder

    given = parse_overrides(overrides or [])
    request = Request.of(pairs, weights, given, val or (), keep or (), freeze)
    folder = out or FINETUNED
    check_run_folder(folder, resume)
    from declip.finetuning.run import run_request

    run = run_request(request, folder, resume, progress)
    leave_unless_finished(run)
    _print_finetuned(run)


def _print_fit(run: Any) -> None:
    from declip.reports.fitted import fitted_lines
    from declip.reports.page import rich_table
    from declip.reports.tables import compared_table

    if run.results:
        console.print(rich_table(compared_table(run.results, run.results_of_start)))
    for line in fitted_lines(run):
        say(line)
    _print_skipped(run)


def _print_finetuned(run: Any) -> None:
    from declip.runs.fitted import FittedRun

    if isinstance(run, FittedRun):
        _print_fit(run)
    else:
        from declip.reports.tables import mixture_lines

        _print_measures(run)
        for line in mixture_lines(run.mixture):
            say(line)
        best = f"Best: step {run.best_step:,} of {run.step:,}."
        say(best if run.evaluated else "No validation set: nothing was measured.")
        _print_skipped(run, ", counted in each epoch")  # a pair is read several times
    size = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    mib = f"{size / 2**20:,.0f} MiB"
    exported = run.folder / "exported"
    written = ""
    if exported.is_dir():
        written = f"Exported: {exported} (the run has {mib})"
    say(f"Report: {run.report}. {written}".strip())
    name = str(run.folder)
    given = ""
    if isinstance(run, FittedRun) and run.name != name:  # a file runs only where it is named
        name = shlex.quote(run.name)
        given = f" --model {name}"
    say(
        f"Search with it: declip embed {name} IMAGES --out index, then: declip search index 'a text'{given}"
    )


def _print_skipped(run: Any, times: str = "") -> None:
    """Print why pairs were left out, with examples."""
    from declip.data.pair import SkipCounter

    for line in SkipCounter.from_dict(run.skipped or {"reasons": {}}).lines():
        say(f"Left out{times}: {line}")


@partial(reads_images, without=("precision",))
def evaluate(
    model: opt.Model,
    datasets: Annotated[
        list[str],
        opt.source(
            "builtin:NAME, NAME:/path, a table, a folder, or paper11:/path; repeatable", "--dataset"
        ),
    ],
    task: Annotated[Task, Option(help="what to measure; linear: a linear probe")] = "zero-shot",
    shots: opt.Shots = None,
    templates: Annotated[str | None, opt.TEMPLATES] = None,
    label_column: Annotated[str | None, Option(help="table column of classes")] = None,
    precision: opt.Precision = "fp32",
    json_out: opt.JsonOut = None,
    overwrite: opt.Overwrite = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Evaluate a model on held-out images."""
    from declip.recipe.checks import check_tasks

    check_outputs((json_out,), overwrite)
    check_tasks((task,), shots, templates)
    from declip.api import evaluate_sets
    from declip.evaluation.protocols import PREFIX, Options
    from declip.reports.page import rich_table
    from declip.reports.tables import results_table

    how: dict[str, Any] = {"device": reading.pop("device"), "precision": precision}
    columns = reading.pop("columns")
    options = Options(templates=templates, shots=shots or [4], **reading)
    suite = next((name for name in datasets if name.startswith(PREFIX)), None)
    if suite is None:
        how |= {"label_column": label_column, "columns": columns}
        results = evaluate_sets(model, datasets, task, options, **how)
        rows = [result.to_dict() for result in results]
        written = rows if len(rows) > 1 else rows[0]
        console.print(rich_table(results_table(results)))
    elif len(datasets) > 1 or label_column is not None:
        raise UserError(
            f"The suite '{suite}' is evaluated alone. Give one --dataset, and no --label-column."
        )
    else:
        written = _evaluate_suite(model, suite, task, options, how)
    if json_out is not None:
        write_output(json_out, result_json(written), "--json", overwrite)


def _evaluate_suite(
    model: str, suite: str, task: str, options: Any, how: dict[str, Any]
) -> dict[str, Any]:
    from declip.evaluation.protocols import SETS, evaluate_suite
    from declip.interchange.read import loaded
    from declip.io.text import percent
    from declip.reports.page import rich_table
    from declip.reports.tables import results_table

    results, summary = evaluate_suite(loaded(model, **how), suite, task, options)
    console.print(rich_table(results_table(results)))
    say(
        f"Average of {len(summary['values'])} of {len(SETS)} sets by their usual metrics: {percent(summary['average'])}"
    )
    for name, reason in summary["missing"].items():
        say(f"Not measured: {name}: {reason}")
    return summary


def compare(
    words: Annotated[
        list[str],
        Argument(
            metavar="RECIPE... [KEY=VALUE]...", help="recipes, and keys that override all of them"
        ),
    ],
    pairs: Annotated[str, Option(help="numbers of training pairs, such as 1k,2k,4k")],
    seeds: Annotated[
        int, Option(min=1, help="runs per recipe and number of pairs, with seeds 0, 1 …")
    ] = 3,
    out: Annotated[
        Path | None, opt.folder("folder of the comparison; default: runs/compare", STUDY_FILE)
    ] = None,
    datasets: Annotated[
        opt.Several, opt.source("default: the sets of the recipe; repeatable", "--dataset")
    ] = None,
    tasks: Annotated[opt.Several, Option("--task", help="default: zero-shot; repeatable")] = None,
    budget: Annotated[
        Literal["samples", "compute"],
        Option(
            help="samples: every recipe runs its steps; compute: every recipe runs as long as the first"
        ),
    ] = "samples",
    tune: Annotated[
        str | None,
        Option(metavar="KEY=V1,V2,…", help="first choose the best value for each recipe"),
    ] = None,
    tune_on: Annotated[
        str | None, opt.source("set that chooses the values of --tune", "--tune-on")
    ] = None,
    terms: opt.Terms = None,
    progress: opt.Progress = True,
) -> None:
    """Compare recipes at several numbers of pairs.

    Run the command again to continue an interrupted comparison, and in several shells to share the work.
    """
    from declip.recipe.checks import read_counts
    from declip.recipe.load import parse_overrides

    counts = read_counts(pairs)
    recipes = [word for word in words if "=" not in word]
    overrides = parse_overrides([word for word in words if "=" in word])
    from declip import api
    from declip.reports.comparison import summary

    folder = out or api.COMPARISON
    outcome = api.compare(
        recipes,
        counts,
        seeds,
        out=folder,
        overrides=overrides,
        datasets=datasets or (),
        tasks=tasks or ("zero-shot",),
        budget=budget,
        tune=tune,
        tune_on=tune_on,
        terms=terms,
        progress=progress,
    )
    console.print(summary(outcome))
    if not outcome.complete:
        raise typer.Exit(2 if outcome.failures else 130)
    say(f"Report: {folder / 'report.html'}")
