"""Public functions: `train`, `evaluate` and `compare`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from declip.comparison import runner
from declip.comparison.outcome import Outcome
from declip.comparison.study import Study
from declip.comparison.tuning import Grid, tune_study
from declip.data.columns import DEFAULT, Columns
from declip.data.loader import Augment
from declip.data.pair import PairSource
from declip.data.sources.open import held_out_sets, name_sources
from declip.data.sources.python_items import Items
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, open_dataset
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.interchange.read import loaded
from declip.io.plugins import read_terms
from declip.models.encoder import Encoder
from declip.models.precision import Precision
from declip.recipe.checks import check_tasks, load_for_training
from declip.recipe.schema import Recipe
from declip.reports.comparison import write_page
from declip.reports.run import write_report
from declip.runs.folder import Run
from declip.supervision.objective import Terms
from declip.supervision.term import Term
from declip.training import distributed
from declip.training.assemble import assemble
from declip.training.optimizer import OptimizerFactory
from declip.training.pairs import warn_of_training_pairs
from declip.training.sinks import Sink
from declip.training.state import Extensions
from declip.training.trainer import Trainer

COMPARISON = Path("runs/compare")  # default folder of `compare`


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    *,
    progress: bool = True,
    report: bool = True,
    data: str | Path | PairSource | Items | None = None,
    val: str | Path | PairSource | Items | Sequence[Any] = (),
    callbacks: Sequence[Sink] = (),
    terms: Mapping[str, type[Term]] | str | Path | None = None,
    optimizer: OptimizerFactory | None = None,
    augment: Augment | None = None,
) -> Run:
    """Train a model as a recipe describes, evaluate it, and write both to a run folder.

    Args:
        recipe: Name of a shipped recipe, a YAML file, or a `Recipe`, with which overrides, data and val are not
            allowed.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``.
        out: The run folder; by default ``runs/NAME``, the recipe's key ``name``.
        resume: Continue the run in that folder if there is one; the result is bit-exact, as if never interrupted.
        progress: Show a bar and messages on standard error.
        report: Write report.html at the end.
        data: Training pairs; sets the key ``data.source``. Also a Python object, see `open_source`.
        val: Evaluation sets, as names or Python objects: zero-shot classification if they have classes, retrieval if
            they have captions.
        callbacks: Objects that receive the numbers of logged steps and evaluations, see `declip.Sink`.
        terms: Losses of your own by name, or a Python file that ends with ``TERMS = {"NAME": YourTerm}``;
            `loss_weights` sets their weights. Pass them again to resume.
        optimizer: Function that makes an optimizer from parameter groups, such as ``lambda groups:
            torch.optim.NAdam(groups)``; the recipe sets learning rate and weight decay. Pass it again to resume.
        augment: Function that changes each image view, (3, S, S) uint8, after its crop and before color jitter; its
            second argument is the NumPy generator of the pair. Pass it again to resume.

    Returns:
        The run. After Ctrl-C or SIGTERM, `finished` is False and a checkpoint has been saved.

    Examples:
        >>> options = {"data": "pairs.csv", "progress": False}
        >>> run = declip.train("runs/demo/recipe.yaml", {"train.steps": 2}, "runs/new", **options)
        >>> run.finished, run.metrics[-1]["step"]
        (True, 2)
    """
    for callback in callbacks:
        if not isinstance(callback, Sink):
            raise UserError(
                f"callbacks has {callback!r}; give objects of subclasses of declip.Sink."
            )
    (source, *sets), sources = name_sources(data, *held_out_sets(val))
    loaded = load_for_training(recipe, overrides, source, sets, resume, sources)
    folder = Path(out).expanduser() if out is not None else Path("runs") / loaded.name
    extensions = Extensions(callbacks, terms_of(terms), optimizer, augment, sources)
    state = assemble(loaded, folder, resume, extensions)
    finish = partial(write_report, held_out=state.held_out) if report else None
    run = Trainer(state, progress).train(finish)
    distributed.destroy_distributed()
    return run


def terms_of(given: Mapping[str, type[Term]] | str | Path | None) -> Terms:
    """Losses by name, also those of a Python file."""
    if isinstance(given, str | Path):
        return read_terms(Path(given).expanduser())
    return given or {}


def evaluate(
    model: str | Path | Run | Encoder,
    dataset: str | Path | PairSource | Items | Dataset,
    task: str = "zero-shot",
    *,
    label_column: str | None = None,
    columns: Columns = DEFAULT,
    templates: str | Sequence[str] | None = None,
    shots: int | None = None,
    batch_size: int = 256,
    workers: int | None = 0,
    device: str = "auto",
    precision: Precision = "fp32",
    progress: bool = True,
) -> Result:
    """Evaluate a model on the test split of a dataset; a linear probe is fitted on its train and validation splits.

    Images that cannot be read are skipped; the result counts them by reason.

    Args:
        model: What `declip.load` takes, or an object with `encode_image`, `encode_text`, `preprocess` and `tokenize`,
            and for "linear" also `encode_backbone`.
        dataset: A name or path that `declip.evaluation.datasets.open_dataset` opens, or an open dataset or source.
        task: "zero-shot", "retrieval", "linear" (probe) or "few-shot".
        label_column: The table column of classes; see `open_dataset`.
        columns: The table columns of images and captions.
        templates: For "zero-shot" and "few-shot": the name of a template set, or templates such as "a photo of {}"; by
            default those of the dataset.
        shots: For "few-shot": number of examples per class; by default 4.
        batch_size: Number of images or texts per forward pass.
        workers: Number of processes that read images; 0: this one; None: one per core, at most 8.
        device: As in `declip.load`; a model that is given as an object stays as it is.
        precision: As `device`.

    Examples:
        >>> declip.evaluate("runs/demo", "pairs.csv", "retrieval").text_to_image.queries
        8
    """
    check_tasks((task,), shots, templates)
    if not isinstance(shots, int | None):
        raise UserError(f"shots is {shots}. Pass one number, such as shots=4.")
    options = Options(
        templates=templates,
        shots=(shots or 4,),
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    return evaluate_sets(
        model,
        [dataset],
        task,
        options,
        label_column=label_column,
        columns=columns,
        device=device,
        precision=precision,
    )[0]


def evaluate_sets(
    model: str | Path | Run | Encoder,
    datasets: Sequence[str | Path | PairSource | Items | Dataset],
    task: str,
    options: Options,
    *,
    label_column: str | None,
    columns: Columns,
    device: str,
    precision: Precision,
) -> list[Result]:
    """As `evaluate`, on several sets, and by several numbers of shots."""
    captioned = task == "retrieval"
    opened = [
        open_dataset(each, label_column=label_column, columns=columns, captioned=captioned)
        for each in datasets
    ]
    warn_of_training_pairs(model, opened)
    return evaluate_all(loaded(model, device, precision), opened, (task,), options)


def compare(
    recipes: str | Path | Sequence[str | Path],
    pairs: int | Sequence[int],
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path = COMPARISON,
    overrides: Mapping[str, Any] | None = None,
    datasets: str | Path | Sequence[str | Path] = (),
    tasks: str | Sequence[str] = ("zero-shot",),
    budget: str = "samples",
    tune: str | None = None,
    tune_on: str | Path | None = None,
    terms: Mapping[str, type[Term]] | str | Path | None = None,
    progress: bool = True,
) -> Outcome:
    """Compare recipes at several numbers of pairs, and write results.json and report.html.

    Args:
        recipes: Names of shipped recipes or YAML files.
        pairs: Numbers of training pairs.
        seeds: The number of seeds, counted from 0, or the seeds.
        out: Folder of the comparison; one that was interrupted continues. Processes that are started with the same
            arguments share the runs.
        overrides: Dotted keys and values for all recipes.
        datasets: Evaluation sets; by default the first recipe's ``final_zero_shot``, or its ``zero_shot``.
        budget: "samples": every recipe takes its steps; "compute": every recipe runs as long as the first.
        tune: A key and values, such as "train.lr=0.001,0.002,0.004", of which each recipe first gets the best, by one
            run of each with the largest number of pairs. A value at the edge of the values is warned of.
        tune_on: The set that chooses; not a test set.
        terms: Losses of your own by name, or a Python file that ends with ``TERMS = {"NAME": YourTerm}``; the weights
            are the recipes'. Pass them again to continue; a file that was changed since is refused.
    """
    grid = None
    if tune is not None:
        grid = Grid.of(tune, None if tune_on is None else str(tune_on))
    study = Study.of(
        recipes,
        pairs,
        seeds,
        overrides=overrides,
        datasets=datasets,
        tasks=tasks,
        budget=budget,
    ).with_terms(terms)
    if grid is not None:
        study = tune_study(study, grid, out, progress)
    outcome = runner.run(study, out, progress)
    write_page(outcome, Path(out).expanduser())
    return outcome
