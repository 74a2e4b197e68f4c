"""The command ``declip``: it parses words and calls the API, nothing else."""

import errno
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from declip.cli.search import embed, index, search
from declip.cli.serve import app as show_page
from declip.cli.weights import export, import_, interpolate
from declip.errors import UserError

if TYPE_CHECKING:
    from declip.recipe.schema import Recipe

app = typer.Typer(
    help="Contrastive language-image models when pairs are few.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Prepare and look at pairs.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(index, name="index")
console = Console()
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
"""A disk that is full, read-only, forbidden or failing, or a path that is too long: the user's to mend."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name, or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    out: Annotated[Path | None, typer.Option(help="the run folder; by default runs/RECIPE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in that folder")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress shown")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="only show where the time of a step goes")] = False,
) -> None:
    """Train a recipe, measure it, and write a report."""
    from declip.recipe.load import load_recipe, parse_overrides

    resolved = load_recipe(recipe, parse_overrides(overrides or []))
    if profile:
        _profile(resolved, out or Path("runs") / f"{Path(recipe).stem}-profile", resume, quiet)
        return
    from declip.api import train as run_training

    run = run_training(resolved, out=out or Path("runs") / Path(recipe).stem, resume=resume, quiet=quiet)
    if not run.leads:
        raise typer.Exit(0 if run.finished else run.status)
    if not run.finished:
        words = shlex.join(["declip", "train", recipe, *(overrides or []), "--out", str(run.folder), "--resume"])
        console.print(
            f"Stopped after step {run.step:,} of {run.recipe.train.steps:,}; a checkpoint was saved. Go on with:"
        )
        console.print(f"  {escape(words)}", highlight=False, soft_wrap=True)
        raise typer.Exit(run.status)
    console.print(_results(run))
    console.print(f"Report: {run.report}", highlight=False, soft_wrap=True)


def _profile(recipe: "Recipe", out: Path, resume: bool, quiet: bool) -> None:
    from declip.training.profile import profile

    if resume:
        raise UserError("--profile keeps no training, so there is nothing to --resume. Give one of the two.")
    found = profile(recipe, out=out, quiet=quiet)
    if found.leads:
        console.print(found.table())
        console.print(f"Trace, for chrome://tracing or ui.perfetto.dev: {out / 'trace.json'}", soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a run, a checkpoint, weights, open_clip:… or huggingface:OWNER/NAME")],
    on: Annotated[
        list[str],
        typer.Option("--dataset", help="builtin:NAME, NAME:/path, a table, a folder, or paper11:/path; again for more"),
    ],
    protocol: Annotated[str, typer.Option(help="zero-shot, retrieval, linear, knn or few-shot")] = "zero-shot",
    templates: Annotated[str | None, typer.Option(help="a template set, or one template with {}")] = None,
    features: Annotated[str, typer.Option(help="probes: backbone, or embedding after the projection")] = "backbone",
    shots: Annotated[str, typer.Option(help="few-shot: images a class")] = "1,2,4,8,16",
    seeds: Annotated[int, typer.Option(min=1, help="few-shot: draws of the images")] = 3,
    label_column: Annotated[str | None, typer.Option(help="a table's column of classes")] = None,
    cache: Annotated[bool, typer.Option(help="probes: keep the features on the disk for the next time")] = True,
    batch: Annotated[int, typer.Option(min=1, help="images a pass")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the result to this file")] = None,
    markdown_out: Annotated[Path | None, typer.Option("--markdown", help="paper11: also write the table here")] = None,
) -> None:
    """Measure a model on held-out images."""
    import json

    from declip.evaluation.datasets import open_dataset
    from declip.evaluation.protocols import Options, evaluate_sets
    from declip.evaluation.results import results_table
    from declip.evaluation.suites import evaluate_suite, is_suite
    from declip.interchange.load import load

    suites = [name for name in on if is_suite(name)]
    if suites and len(on) > 1:
        raise UserError(f"'{suites[0]}' is a table of its own. Measure it alone, with one --dataset.")
    if markdown_out is not None and not suites:
        raise UserError(
            f"--markdown writes the table of a suite such as paper11:/data, but --dataset is '{on[0]}'. Use --json."
        )
    options = Options(
        templates=templates,
        batch=batch,
        workers=workers,
        features=cast(Any, features),  # told apart where it is used
        shots=_numbers("shots", shots),
        seeds=seeds,
        cache=cache,
    )
    loaded = load(model, device)
    if suites:
        suite = evaluate_suite(loaded, on[0], protocol, options)
        console.print(suite.table(model))
        _write(markdown_out, suite.markdown(model), "--markdown")
        _write(json_out, json.dumps(suite.to_dict(), indent=1), "--json")
        return
    sets = [open_dataset(name, label_column=label_column) for name in on]
    results = evaluate_sets(loaded, sets, (protocol,), options)
    console.print(results_table(results))
    rows = [result.to_dict() for result in results]
    _write(json_out, json.dumps(rows if len(rows) > 1 else rows[0], indent=1), "--json")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--{option} is '{text}'; give whole numbers with commas, such as 1,2,4.") from None


def _write(path: Path | None, text: str, option: str) -> None:
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write '{path}': {error.strerror}. Choose another place with {option}.") from error


@app.command()
def compare(
    words: Annotated[list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="recipes, and keys for all")],
    pairs: Annotated[str, typer.Option(help="numbers of distinct pairs, such as 1k,2k,4k")],
    seeds: Annotated[int, typer.Option(min=1, help="runs of each number, with seeds 0, 1 …")] = 3,
    out: Annotated[Path, typer.Option(help="the comparison's folder")] = Path("runs/compare"),
    on: Annotated[list[str] | None, typer.Option("--dataset", help="what to measure on; may be given again")] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="how; may be given again; zero-shot by default")] = None,
    budget: Annotated[str, typer.Option(help="equal samples, compute, or both")] = "both",
    reference: Annotated[str | None, typer.Option(help="whose time is the compute budget; the last recipe's")] = None,
    ladder: Annotated[bool, typer.Option("--ablation", help="also take the last recipe apart, term by term")] = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="also clip with weaker, stronger, two views")] = False,
    tune: Annotated[list[str] | None, typer.Option(help="KEY=A,B,C: every arm tries all first, keeps its best")] = None,
    tune_on: Annotated[str | None, typer.Option(help="validation set of the tuning")] = None,
    tune_pairs: Annotated[str | None, typer.Option(help="pairs of a try; the middle one of --pairs")] = None,
    tune_steps: Annotated[int | None, typer.Option(min=1, help="steps of a try")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="runs side by side; one for each core")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress shown")] = False,
) -> None:
    """Compare recipes at several numbers of pairs; stopped and started again, it goes on."""
    from declip.api import compare as run_comparison
    from declip.comparison.study import BUDGETS, read_counts
    from declip.recipe.load import parse_overrides

    outcome = run_comparison(
        [word for word in words if "=" not in word],
        read_counts(pairs),
        seeds,
        out=out,
        overrides=parse_overrides([word for word in words if "=" in word]),
        on=on or (),
        protocols=protocol or ("zero-shot",),
        budgets=BUDGETS if budget == "both" else (budget,),
        reference=reference,
        ladder=ladder,
        baselines=baselines,
        tune=_grid(tune or []),
        tune_on=tune_on,
        tune_pairs=None if tune_pairs is None else read_counts(tune_pairs)[0],
        tune_steps=tune_steps,
        jobs=jobs,
        quiet=quiet,
    )
    if not outcome.complete:
        left = len(outcome.study.cells()) - len(outcome.rows)
        console.print(f"{left} of {len(outcome.study.cells())} runs are left. Give the same command to go on.")
        for name, reason in outcome.failures.items():
            console.print(f"  [bold red]failed[/] {escape(name)}: {escape(reason.splitlines()[-1])}", soft_wrap=True)
        raise typer.Exit(2 if outcome.failures else 130)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


for command in (embed, search, export, interpolate):
    app.command()(command)
app.command(name="import")(import_)
app.command(name="app")(show_page)


def _grid(words: list[str]) -> dict[str, list[Any]]:
    """Read KEY=A,B,C words."""
    from declip.recipe.load import parse_overrides, read_value

    grid = parse_overrides(words)
    return {key: [read_value(key, word) for word in values.split(",")] for key, values in grid.items()}


@app.command()
def recipes() -> None:
    """List the shipped recipes and their terms."""
    from declip.recipe.load import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        terms = ", ".join(f"{weight:g} {term}" for term, weight in recipe.active_losses.items())
        console.print(f"[bold]{name}[/]  {recipe.image.model}, {recipe.image.size} px, {recipe.data.label}")
        console.print(f"    {terms}")


@data.command()
def prepare(
    source: Annotated[str, typer.Argument(help="builtin:NAME; with --out also a table, a folder, or tar shards")],
    out: Annotated[Path | None, typer.Option(help="folder for tar shards with shrunk pictures")] = None,
    size: Annotated[int, typer.Option(help="pixels of a picture's shorter side, at most")] = 256,
    shard_pairs: Annotated[int, typer.Option(help="pairs of a shard")] = 10_000,
    quality: Annotated[int, typer.Option(help="of the JPEG files written")] = 92,
    workers: Annotated[int | None, typer.Option(min=0, help="processes; one for each core, 8 at most")] = None,
    image_column: Annotated[str, typer.Option(help="a table's column of images")] = "image",
    caption_column: Annotated[str, typer.Option(help="a table's column of captions")] = "caption",
    image_root: Annotated[str | None, typer.Option(help="folder that image paths are relative to")] = None,
    drop: Annotated[Path | None, typer.Option(help="a list of pairs to leave out, such as `declip app` saves")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="where a built-in set goes; by default DECLIP_CACHE or the user's cache")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress shown")] = False,
) -> None:
    """Shrink a source's pictures once and write shards; or fetch and render a built-in set. Later calls go on."""
    from declip.data.builtin import prepare as prepare_builtin
    from declip.data.prepare import prepare_source

    if out is None:
        if drop is not None:
            raise UserError("--exclude leaves pairs out of shards; say where those go with --out DIR.")
        console.print(f"Ready: {prepare_builtin(source, cache, progress=not quiet)}", soft_wrap=True)
        return
    if cache is not None:
        raise UserError("--cache is where a built-in set is made, --out where shards go; give one of them.")
    try:
        made = prepare_source(
            source,
            out,
            size=size,
            shard_pairs=shard_pairs,
            quality=quality,
            workers=workers,
            image_column=image_column,
            caption_column=caption_column,
            image_root=image_root,
            drop=drop,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        _fail("Stopped. The shards made so far are kept; the same command goes on.", status=130)
    console.print(made.summary(), highlight=False, soft_wrap=True, markup=False)


@data.command()
def inspect(
    source: Annotated[str, typer.Argument(help="a table, a folder, tar shards, or builtin:NAME")],
    sample: Annotated[int, typer.Option(help="pairs to read, drawn over the source's length")] = 2000,
    everything: Annotated[bool, typer.Option("--all", help="read every pair instead")] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="a test set whose images are looked for; again for more")
    ] = None,
    size: Annotated[int, typer.Option(help="side of the training images, pixels")] = 224,
    batch: Annotated[int, typer.Option(help="pairs of a training batch, for equal captions")] = 128,
    seed: Annotated[int, typer.Option(help="draws the sample and what is shown")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that read; one for each core, 8 at most")
    ] = None,
    image_column: Annotated[str, typer.Option(help="a table's column of images")] = "image",
    caption_column: Annotated[str, typer.Option(help="a table's column of captions")] = "caption",
    image_root: Annotated[str | None, typer.Option(help="folder that image paths are relative to")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the numbers to this file")] = None,
    html_out: Annotated[Path | None, typer.Option("--html", help="also write a page with pictures")] = None,
    sheet_out: Annotated[Path | None, typer.Option("--contact-sheet", help="also write a contact sheet, PNG")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress shown")] = False,
) -> None:
    """Look at pairs before training on them: sizes, lengths, duplicates, broken ones, and what that means."""
    from declip.inspection import inspect_source
    from declip.reports.inspection_output import check_writable, write_json, write_page, write_sheet
    from declip.reports.inspection_terminal import summary

    check_writable((json_out, html_out, sheet_out))
    inspection = inspect_source(
        source,
        None if everything else sample,
        seed=seed,
        workers=workers,
        size=size,
        batch=batch,
        against=against or (),
        image_column=image_column,
        caption_column=caption_column,
        image_root=image_root,
        progress=not quiet,
    )
    console.print(summary(inspection))
    for write, path in ((write_json, json_out), (write_page, html_out), (write_sheet, sheet_out)):
        if path is not None:
            write(inspection, path)
            console.print(f"Written: {path}", highlight=False, soft_wrap=True, markup=False)


def _results(run: Any) -> Table | str:
    from declip.evaluation.results import read_result, results_table

    results = [result for result in map(read_result, run.results) if result is not None]
    seen = run.step * run.recipe.train.batch_size
    speeds = [row["samples_per_second"] for row in run.metrics if row["samples_per_second"]]
    speed = f"{sorted(speeds)[len(speeds) // 2]:,.0f} pairs/s (median)" if speeds else "speed not measured"
    caption = f"{run.recipe.name}, seed {run.recipe.seed}: {seen:,} pairs seen in {run.step:,} steps, {speed}"
    if not results:
        advice = "Name one before training, such as 'evaluation.retrieval=[heldout.csv]'."
        return escape(f"{caption}. Nothing was measured: evaluation names no set for this data.source. {advice}")
    table = results_table(results)
    table.caption = caption
    return table


def main() -> None:
    """Run the command; a user's mistake ends with its message and status 2, never with a traceback."""
    printed, threading.excepthook = threading.excepthook, _leave_disks_to_main
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("Stopped. What a run had saved is kept; it goes on with --resume.", status=130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f"'{error.filename}'" if error.filename else "A file"
        advice = "Make room; a run goes on with --resume." if error.errno in FULL else "Mend that or give another path."
        _fail(f"{where} cannot be read or written: {error.strerror}. {advice}")
    finally:
        threading.excepthook = printed


def _leave_disks_to_main(error: threading.ExceptHookArgs) -> None:
    """Print no trace of a failed write: the thread that writes TensorBoard's events hands its error to the run."""
    if not (isinstance(error.exc_value, OSError) and error.exc_value.errno in DISK):
        threading.__excepthook__(error)


def _fail(message: str, status: int = 2) -> NoReturn:
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(rank + message)}", highlight=False, soft_wrap=True)
    sys.exit(status)
