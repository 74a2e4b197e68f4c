"""Public functions: `train`, `finetune`, `evaluate` and `compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from declip import finetuning
from declip.comparison import runner
from declip.comparison.outcome import Outcome
from declip.comparison.study import Study
from declip.data.pair import PairSource
from declip.data.sources.open import named_objects
from declip.data.sources.python_items import Items
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, open_dataset
from declip.evaluation.encode import Encoder
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import Result
from declip.interchange.read import load
from declip.recipe.schema import Recipe
from declip.reports.comparison import write_page
from declip.reports.run import write_report
from declip.runs.folder import Run
from declip.supervision.objective import extra_terms
from declip.supervision.term import Term
from declip.training import distributed
from declip.training.assemble import assemble
from declip.training.resolve import held_out_sets, resolve_recipe, several
from declip.training.sinks import Sink
from declip.training.trainer import Trainer


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    report: bool = True,
    *,
    data: str | Path | PairSource | Items | None = None,
    val: str | Path | PairSource | Items | Sequence[Any] = (),
    callbacks: Sequence[Sink] = (),
    terms: Mapping[str, type[Term]] | None = None,
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`, which allows no overrides, data or val.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``.
        out: The run folder; by default ``runs/NAME``.
        resume: Continue the run in that folder if there is one; the result is bit-exact, as if never interrupted.
        report: Write report.html at the end.
        data: The training pairs, for the key ``data.source``; also a Python object, see `open_source`.
        val: Held-out sets: for zero-shot classification if they have classes, for retrieval if they have captions;
            names or Python objects.
        callbacks: Objects that get the numbers of logged steps and evaluations, see `declip.Sink`.
        terms: Losses of your own, which `loss_weights` weights by these names. Give them again to resume.

    Returns:
        The run. `finished` is False after Ctrl-C or SIGTERM; a checkpoint was then written.
    """
    for callback in callbacks:
        if not isinstance(callback, Sink):
            raise UserError(f"callbacks has {callback!r}; give objects of subclasses of declip.Sink.")
    with named_objects(data, *held_out_sets(val)) as (source, *sets), extra_terms(terms or {}):
        resolved = resolve_recipe(recipe, overrides, source, sets)
        folder = Path(out).expanduser() if out is not None else Path("runs") / resolved.name
        parts = assemble(resolved, folder, resume, quiet, callbacks)
        run = Trainer(parts).train(write_report if report else None)
    distributed.leave()
    return run


def finetune(
    pairs: str | Path | PairSource | Items,
    weights: str | Path | None = None,
    *,
    val: str | Path | PairSource | Items | Sequence[Any] = (),
    keep: str | Path | PairSource | Items | Sequence[Any] = (),
    out: str | Path | None = None,
    freeze: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Fine-tune pretrained weights on your pairs; the run ends with the weights of its best evaluation.

    The folder also gets report.html and exported/: safetensors, and open_clip or huggingface where they can hold the
    model.

    Args:
        pairs: A source of pairs: a table, a folder, tar shards, a built-in set or a Python object, see `open_source`.
        weights: What `declip.load` takes, or timm:NAME; by default `declip.interchange.starter.NAME` on a CPU.
        val: Validation sets as in `train`; without one a part of the pairs is split off, see `split_pairs`.
        keep: Sets that the weights are good at and should stay good at: weights that were trained whole are mixed with
            their start, in the proportion that is best on these and the validation sets (WiSE-FT).
        out: The run folder; by default ``runs/finetune``.
        freeze: Towers to freeze: "both", "image", "text" or "none"; by default weights and device decide.
        resume: Continue the run in that folder with its recipe and its split, if there is one.
        overrides: Dotted keys, such as ``**{"train.lr": 1e-4}``; the others are those of `settings`.
    """
    held_out = held_out_sets(val)
    with named_objects(pairs, *held_out, *held_out_sets(keep)) as (source, *sets):
        own, kept = sets[: len(held_out)], sets[len(held_out) :]
        options: dict[str, Any] = {"val": own, "keep": kept, "freeze": freeze, "resume": resume, "quiet": quiet}
        return finetuning.finetune(source, weights, out=out, **options, **overrides)


def evaluate(
    model: str | Path | Encoder,
    dataset: str | Path | PairSource | Items | Dataset,
    task: str = "zero-shot",
    *,
    label_column: str | None = None,
    **options: Any,
) -> Result:
    """Evaluate a model on the test split of a dataset; probes learn from its train and validation splits.

    Images that cannot be read are left out and counted by reason in the result.

    Args:
        model: What `declip.load` takes, or anything with `encode_image`, `encode_text`, `preprocess` and `tokenize`;
            for probes of the backbone also `encode_backbone`.
        dataset: A name or path that `declip.evaluation.datasets.open_dataset` opens, or an open dataset or source.
        task: "zero-shot", "retrieval" or "linear".
        label_column: A table's column with the classes; see `open_dataset`.
        options: Fields of `declip.evaluation.protocols.Options`, such as ``batch_size=64`` or
            ``templates="a photo of {}"``.
    """
    chosen, opened = Options(**options), open_dataset(dataset, label_column=label_column)
    return evaluate_all(load(model) if isinstance(model, str | Path) else model, opened, (task,), chosen)[0]


def compare(
    recipes: str | Path | Sequence[str | Path],
    pairs: int | Sequence[int],
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path,
    **options: Any,
) -> Outcome:
    """Compare recipes at several numbers of pairs and write results.json and report.html.

    The other arguments (`datasets`, `tasks`, `overrides`, `budget`) are those of `declip.comparison.study.Study.of`,
    and `jobs` and `quiet` those of `declip.comparison.runner.run`.
    """
    running = {name: options.pop(name) for name in ("jobs", "quiet") if name in options}
    lists = {"datasets", "tasks"}
    options |= {name: tuple(map(str, several(options[name]))) for name in lists & options.keys()}
    numbers = seeds if isinstance(seeds, int) else list(map(int, seeds))
    names, counts = map(str, several(recipes)), map(int, several(pairs))
    outcome = runner.run(Study.of(list(names), list(counts), numbers, **options), out, **running)
    write_page(outcome, Path(out).expanduser())
    return outcome
