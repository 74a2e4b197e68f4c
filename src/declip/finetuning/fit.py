"""Fine-tuning of the projections between frozen towers in closed form: no steps, no batches, no validation part.

Every caption of every pair is used, on one plain view of its image; cross-validation measures and chooses.
"""

import copy
import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from declip.closed_form.estimates import group_mean
from declip.closed_form.growth import growth
from declip.closed_form.heads import FEWEST, Choice, choose_heads
from declip.closed_form.mixing import mixed_choices
from declip.closed_form.ranks import HeldOutRanks
from declip.closed_form.solve import START, ClassPairs
from declip.data.images.thumbnails import thumbnails_of
from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.leakage import leaking_column
from declip.finetuning import outputs
from declip.finetuning.features import (
    Features,
    FrozenEncoder,
    class_pairs,
    compute_features,
    embeddings,
    projections,
)
from declip.finetuning.wise_ft import ALPHAS, best_mixture, set_scores
from declip.interchange.export import of_run
from declip.interchange.timm_weights import class_start
from declip.interchange.weights import Uninitialized
from declip.io.atomic import atomic_write, write_text
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import TextEncoder
from declip.models.image_tower import PosteriorProjection
from declip.models.layers import PROJECTIONS
from declip.recipe.schema import Recipe
from declip.runs import folder as run_folder
from declip.runs.checkpoint import Checkpoint, CheckpointWriter, list_checkpoints, prefixed
from declip.runs.folder import Run, log
from declip.training import distributed
from declip.training.assemble import Resolved, resolve
from declip.training.pairs import described, refuse_broken, sample_hashes
from declip.training.pretrained import load_tensors
from declip.training.sinks import RunInfo, monitored
from declip.training.state import NO_EXTENSIONS, Extensions, versions
from declip.training.trackers import trackers_of
from declip.training.warnings import caption_warnings

LEFT_OUT = "left-out pairs"  # the set of cross-validation in the scores of a mixture
STEP = 1  # of the checkpoint: fitting is one step
SHOWN_WORST = 16  # images on the page of the run, each with its worst caption


def closed_form(recipe: Recipe) -> bool:
    """Whether a fine-tuning fits projections alone: both towers are frozen, without adapters."""
    tune = recipe.finetune
    return tune.freeze_image_blocks == tune.freeze_text_blocks == "all" and tune.lora is None


def fit(recipe: Recipe, folder: Path, resume: bool, quiet: bool, added: Extensions = NO_EXTENSIONS) -> Run:
    """Fit the projections of frozen towers, evaluate them and write the run folder, all on rank 0."""
    resolved = resolve(recipe, folder, resume, added)
    resolved.hosts.on_rank_zero(partial(_fit, resolved, folder, resume, quiet, added))
    return Run(folder, STEP, True, is_rank_zero=distributed.is_rank_zero())


def _fit(resolved: Resolved, folder: Path, resume: bool, quiet: bool, added: Extensions) -> None:
    recipe, source, held_out = resolved.recipe, resolved.source, resolved.held_out
    # --- all checks, then the run folder
    model = frozen_model(resolved).to(resolved.device)
    for pairs in (source, *map(held_out.test, recipe.evaluation.keep)):
        refuse_broken(pairs, recipe.data.max_broken_fraction)
    samples, trackers = sample_hashes(recipe, source, held_out), trackers_of(recipe.train.report_to)
    resumed = resume and (folder / run_folder.RECIPE).is_file()
    if resumed:
        run_folder.open_folder(recipe, folder, resume)  # refuses another recipe
        if list_checkpoints(folder) and Run(folder).report.exists():  # written last, after the exports
            log.info("The run in '%s' is finished.", folder)
            return
    encoder = FrozenEncoder(model, recipe.train.precision)
    features = compute_features(encoder, source, recipe, not quiet)
    if not resumed:
        run_folder.open_folder(recipe, folder, resume, added.lists)
    with monitored(RunInfo(folder, 0, STEP, recipe.train.batch_size, quiet), trackers) as monitor:
        log.info("Fitting: %s", described(source))
        for warning in caption_warnings(source, model.tokenizer):
            log.warning(warning)
        # --- heads and the checkpoint
        skipped = {**features.skipped.to_dict(), "seen": len(source)}
        write_text(folder / run_folder.SKIPPED, json.dumps(skipped, indent=1))
        weights = resolved.weights
        starts = weights is not None and weights.projected  # as a CLIP has
        classes = None if starts else class_pairs(resolved, encoder, not quiet)
        if starts:
            features = features._replace(pairs=embeddings(features.pairs, model))
        start = None if classes is None or weights is None else class_start(weights, classes.texts)
        choice = choose_heads(features.pairs, features.groups, classes, recipe.seed, starts, start)
        onto = copy.deepcopy(projections(model)) if starts else None
        tasks, mixed = held_out.tasks(recipe, final=True), choice
        # --- the sets to keep with the start, and its mixture with the heads
        if recipe.evaluation.keep and choice.start_heads is not None:
            if not starts:
                set_heads(model, replace(choice, heads=choice.start_heads))
            for result in held_out.measure(encoder, tasks, not quiet):
                monitor.evaluation(0, result.to_dict())
            choices = mixed_choices(choice, ALPHAS)

            def scores_of(alpha: float) -> dict[str, float]:
                set_heads(model, choices[alpha], onto)
                outcome = choices[alpha].outcome
                own = {} if outcome is None else {LEFT_OUT: outcome.recall(1, features.groups).value}
                return own | set_scores(encoder, recipe, quiet, held_out)

            if len(choices) > 1:
                mixture = best_mixture(scores_of)
                write_text(folder / run_folder.MIXTURE, json.dumps(mixture, indent=1))
                mixed = choices[mixture["alpha"]]
            elif choice.form != START:
                log.warning(f"There are fewer than {FEWEST} different pairs to measure on, so --keep changes nothing.")
        set_heads(model, mixed, onto)
        extra = {"versions": versions(), "skipped": skipped, "samples": samples}
        with CheckpointWriter(folder, recipe.train.keep_checkpoints) as writer:
            writer.write(Checkpoint(STEP, prefixed("model", model.state_dict()), {}, recipe.to_yaml(), extra))
            monitor.advance(STEP)
            # --- what is known about them
            curve = {} if choice.outcome is None else growth(choice, len(features.pairs.images), recipe.seed).to_dict()
            _write_facts(folder, source, features, mixed, classes, curve)
            for result in held_out.measure(encoder, tasks, not quiet):
                monitor.evaluation(STEP, result.to_dict())
        monitor.flush()
        outputs.write_finetuned(folder, encoder, held_out, of_run(folder, model, STEP))


def frozen_model(resolved: Resolved) -> DualEncoder:
    """Build the model with the towers of the start and projections that are still to be set."""
    recipe, weights = resolved.recipe, resolved.weights
    assert weights is not None, "the schema requires finetune.pretrained for frozen blocks"
    if not weights.whole and not (recipe.text.hf_model is not None and recipe.text.pretrained):
        raise UserError(
            f"'{weights.origin}' has no text tower to freeze. Leave --freeze out, or give a text encoder too: "
            "--from timm:NAME/FILE+ENCODER."
        )
    encoder = weights.encoder
    if isinstance(encoder, TextEncoder):  # built without transformers, whose import takes longer than torch's
        encoder = replace(encoder, filled_later=True)
    with Uninitialized():
        model = DualEncoder.from_recipe(recipe, encoder)
    for name, parameter in model.named_parameters():
        if name.startswith(PROJECTIONS):  # which the weights may lack
            nn.init.zeros_(parameter)
    model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
    load_tensors(weights, model)
    if not all(isinstance(projection, nn.Linear | PosteriorProjection) for projection in projections(model)):
        raise UserError(
            f"--freeze both fits linear projections, and the towers of '{weights.origin}' have none. Give --freeze "
            "none with finetune.lora={rank: 8}, or --freeze image or text."
        )
    return model.eval()


@torch.no_grad()
def set_heads(model: DualEncoder, choice: Choice, onto: Sequence[Any] | None = None) -> None:
    """Set both projections and the logit scale; dimensions beyond the number of directions are 0.

    Where the start has projections, `onto`, the heads are maps of their space, and are applied after them.
    """
    if onto is not None and choice.form == START:  # they stay as they are
        return
    if (classifier := choice.heads.classifier) is not None:
        model.image_tower.match_projection({f"{PROJECTIONS[0]}classes": classifier.rows})
        for buffer, tensor in zip(model.image_tower.proj.buffers(), classifier, strict=True):
            buffer.copy_(tensor)
    heads = choice.heads.image, choice.heads.text
    for projection, rows, first in zip(projections(model), heads, onto or (None, None), strict=True):
        weight, bias = rows.to(projection.weight), torch.zeros(len(rows)).to(projection.weight)
        if first is not None:
            bias = weight @ first.bias if first.bias is not None else bias
            weight = weight @ first.weight
        count = min(len(rows), len(projection.weight))
        projection.weight.zero_()
        projection.weight[:count] = weight[:count]
        if projection.bias is not None:
            projection.bias.zero_()
            projection.bias[:count] = bias[:count]
    model.logit_scale.fill_(float(np.log(choice.logit_scale)))


# --- the files that the report reads


def _write_facts(
    folder: Path,
    source: PairSource,
    features: Features,
    choice: Choice,
    classes: ClassPairs | None,
    curve: dict[str, Any],
) -> None:
    pairs, outcome = features.pairs, choice.outcome
    facts = {"name": source.name, "pairs": len(source), "captions": source.captions_from, "credit": source.credit}
    worst = [] if outcome is None else _write_ranks(folder, source, features, outcome)
    write_text(folder / run_folder.EXAMPLES, json.dumps({"source": facts, "losses": {}, "views": [], "worst": worst}))
    fitted: dict[str, Any] = {
        "pairs": len(pairs.images),
        "groups": len(np.unique(features.groups)),
        "captions": len(pairs.texts),
        "classes": 0 if classes is None else len(classes.rows),
        **choice.form._asdict(),  # method and ridge
        "class_weight": choice.class_weight,
        "logit_scale": choice.logit_scale,
    }
    if outcome is not None:
        fitted |= _measured(choice, outcome, features.groups)
        first = np.searchsorted(pairs.owners.numpy(), np.arange(len(pairs.images)))  # caption of each image
        fitted["leaking"] = leaking_column(source, features.indices[first].tolist(), pairs.images, features.groups)
        fitted["growth"] = curve
    write_text(folder / run_folder.CROSS_VALIDATION, json.dumps(fitted, indent=1))


def _measured(choice: Choice, outcome: HeldOutRanks, groups: np.ndarray) -> dict[str, Any]:
    """What cross-validation says about the heads, beside the same numbers of the start or of chance."""
    own, start = outcome.percentiles().numpy(), choice.start
    gain = group_mean(own - (0.5 if start is None else start.percentiles().numpy()), groups)
    measures: dict[str, Any] = {"percentile": outcome.percentile(groups)._asdict()}
    if start is not None:
        measures["percentile_of_start"] = start.percentile(groups)._asdict()
    measures |= {"gain": gain._asdict(), "better": gain.low > 0}
    # Recall depends on the number of candidates, and is near 1 for any heads among a few.
    candidates = round(float(outcome.images.double().mean()))
    ks = [k for k in (1, 10) if k <= candidates / 5]
    recalls = {str(k): {**outcome.recall(k, groups)._asdict(), "chance": k / candidates} for k in ks}
    return {**measures, "candidates": candidates, "recall": recalls}


def _write_ranks(folder: Path, source: PairSource, features: Features, outcome: HeldOutRanks) -> list[dict[str, Any]]:
    """Write the out-of-fold rank of each caption, the worst first: 0 is best, 1 worst.

    Return the worst caption of each of `SHOWN_WORST` images, with the image.
    """
    order = outcome.fit.argsort(descending=True, stable=True).tolist()
    rows = [(source.key(int(features.indices[row])), features.captions[row], float(outcome.fit[row])) for row in order]
    path = folder / run_folder.OUT_OF_FOLD
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "caption", "rank"])
        table.writerows((key, caption, f"{rank:.4f}") for key, caption, rank in rows)
    # --- the worst caption of each image, without those that are first
    worst = dict[int, tuple[str, str, float]]()
    for row, (key, caption, rank) in zip(order, rows, strict=True):
        index = int(features.indices[row])
        if rank > 0 and len(worst) < SHOWN_WORST:
            worst.setdefault(index, (key, caption, rank))
    image_of = thumbnails_of(source)
    shown = list[dict[str, Any]]()
    for index, (key, caption, rank) in worst.items():
        image = image_of(index)
        thumbnail = image and image._asdict()
        shown.append({"key": key, "caption": caption, "rank": rank, "image": thumbnail})
    return shown
