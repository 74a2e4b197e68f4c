"""Fine-tuning of the projections between frozen towers in closed form: no steps, no batches, no validation part.

Every caption of every pair is used, on one plain view of its image; cross-validation measures and chooses.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from declip.data.images.thumbnails import thumbnails_of
from declip.data.pair import PairSource, SkipCounter
from declip.errors import UserError
from declip.evaluation.encode import Encoder, encode_source
from declip.io.atomic import atomic_write, write_text
from declip.io.pool import usual_workers
from declip.models.closed_form import START, ClassPairs, Pairs
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import TextEncoder
from declip.recipe.schema import Recipe
from declip.runs import folder as run_folder
from declip.runs.checkpoint import Checkpoint, CheckpointWriter, list_checkpoints, prefixed
from declip.runs.folder import Run, log
from declip.training import distributed
from declip.training.assemble import Resolved, resolve
from declip.training.frozen_encoder import FrozenEncoder
from declip.training.growth import growth
from declip.training.heads import Choice, HeldOutRanks, choose_heads, group_mean
from declip.training.pairs import caption_warnings, evaluation_tasks, measure, refuse_broken, refuse_many, sample_hashes
from declip.training.parts import versions
from declip.training.pretrained import load_tensors
from declip.training.sinks import RunInfo, monitored
from declip.training.trackers import trackers_of

STEP = 1  # of the checkpoint: fitting is one step
SHOWN_WORST = 16  # captions on the page of the run
MANY = 2_000  # pairs from which on processes read the images

# Finds pairs that must not be held out from each other, see `declip.inspection.split.related_pairs`.
Related = Callable[[PairSource, bool], tuple[np.ndarray, np.ndarray]]
Finish = Callable[[Path, Encoder], None]


class Features(NamedTuple):
    """Pooled features of all pairs that can be used, with what the out-of-fold table says of them."""

    pairs: Pairs
    groups: np.ndarray  # (n,), see `choose_heads`
    indices: np.ndarray  # (m,) of the pair of each caption in the source
    captions: list[str]  # (m,)
    skipped: SkipCounter


def closed_form(recipe: Recipe) -> bool:
    """Whether a fine-tuning fits projections alone: both towers are frozen, without adapters."""
    tune = recipe.finetune
    return tune.freeze_image_blocks == tune.freeze_text_blocks == "all" and tune.lora is None


def fit(recipe: Recipe, folder: Path, resume: bool, quiet: bool, related: Related, finish: Finish) -> Run:
    """Fit the projections of frozen towers, evaluate them, write the run folder and call `finish`, all on rank 0."""
    resolved = resolve(recipe, folder, resume)
    resolved.hosts.on_rank_zero(partial(_fit, resolved, folder, resume, quiet, related, finish))
    return Run(folder, STEP, True, is_rank_zero=distributed.is_rank_zero())


def _fit(resolved: Resolved, folder: Path, resume: bool, quiet: bool, related: Related, finish: Finish) -> None:
    recipe, source = resolved.recipe, resolved.source
    # --- all checks, then the run folder
    model = frozen_model(resolved).to(resolved.device)
    refuse_broken(source, recipe.data.max_broken_fraction)
    samples, trackers = sample_hashes(recipe, source), trackers_of(recipe.train.report_to)
    run_folder.open_folder(recipe, folder, resume)
    if list_checkpoints(folder) and Run(folder).report.exists():  # written last, after the exports
        log.info("The run in '%s' is finished.", folder)
        return
    with monitored(RunInfo(folder, 0, STEP, recipe.train.batch_size, quiet), trackers) as monitor:
        for warning in caption_warnings(source, model.tokenizer):
            log.warning(warning)
        # --- features, heads and the checkpoint
        encoder = FrozenEncoder(model)
        features = compute_features(encoder, source, recipe, related, not quiet)
        skipped = {**features.skipped.to_dict(), "seen": len(source)}
        write_text(folder / run_folder.SKIPPED, json.dumps(skipped, indent=1))
        starts = resolved.weights is not None and resolved.weights.projected  # as a CLIP has
        classes = None if starts else class_pairs(resolved, encoder, not quiet)
        if starts:
            features = features._replace(pairs=embeddings(features.pairs, model))
        choice = choose_heads(features.pairs, features.groups, classes, recipe.seed, embedded=starts)
        set_heads(model, choice, starts)
        extra = {"versions": versions(), "skipped": skipped, "samples": samples}
        with CheckpointWriter(folder, recipe.train.keep_checkpoints) as writer:
            writer.write(Checkpoint(STEP, prefixed("model", model.state_dict()), {}, recipe.to_yaml(), extra))
            monitor.advance(STEP)
            # --- what is known about them
            _write_facts(folder, source, features, choice, classes, recipe.seed)
            for result in measure(cast(Encoder, encoder), evaluation_tasks(recipe, final=True), not quiet):
                monitor.evaluation(STEP, result.to_dict())
        monitor.flush()
        finish(folder, cast(Encoder, encoder))


def frozen_model(resolved: Resolved) -> DualEncoder:
    """Build the model with the towers of the start and projections that are still to be set."""
    recipe, weights = resolved.recipe, resolved.weights
    assert weights is not None, "the schema requires finetune.pretrained for frozen blocks"
    if not weights.whole and not (recipe.text.hf_model is not None and recipe.text.pretrained):
        raise UserError(
            f"'{weights.origin}' has no text tower to freeze. Leave --freeze out, or give a text encoder too: "
            "--from timm:NAME/FILE+ENCODER."
        )
    torch.manual_seed(recipe.seed)
    encoder = weights.encoder
    if isinstance(encoder, TextEncoder):  # built without transformers, whose import takes longer than torch's
        encoder = replace(encoder, filled_later=True)
    model = DualEncoder.from_recipe(recipe, encoder)
    model.image_tower.refuse_size(recipe.image.model, recipe.image.size)
    load_tensors(weights, model)
    if not all(isinstance(projection, nn.Linear) for projection in projections(model)):
        raise UserError(
            f"--freeze both fits linear projections, and the towers of '{weights.origin}' have none. Give --freeze "
            "none with finetune.lora={rank: 8}, or --freeze image or text."
        )
    return model.eval()


def projections(model: DualEncoder) -> tuple[nn.Linear, nn.Linear]:
    """The projections of images and of texts into the shared space."""
    return cast(nn.Linear, model.image_tower.proj), cast(nn.Linear, model.text_tower.text_projection)


@torch.no_grad()
def embeddings(pairs: Pairs, model: DualEncoder) -> Pairs:
    """Pooled features as embeddings of unit length in the space of the model's projections."""
    image, text = projections(model)
    device = image.weight.device
    sides = [(image, pairs.images), (text, pairs.texts)]
    images, texts = (normalize(side(rows.to(device)).float(), dim=-1).cpu() for side, rows in sides)
    return Pairs(images, texts, pairs.owners)


def compute_features(
    encoder: FrozenEncoder, source: PairSource, recipe: Recipe, related: Related, shown: bool
) -> Features:
    """Compute the pooled features of all images and distinct captions, and the groups that stay in one fold."""
    places, groups = related(source, shown)
    # A pair that cannot be read now was read or refused a moment ago, so both passes see the same pairs.
    found = encode_source(
        cast(Encoder, encoder),
        source,
        encode=encoder.pool_images,
        texts=False,
        batch_size=64,
        workers=usual_workers() if len(source) > MANY else 0,
        progress=shown,
    )
    refuse_many(found.skipped, source, recipe.data.max_broken_fraction)
    group_of = dict(zip(places.tolist(), groups.tolist(), strict=True))
    captions = found.flat_captions
    pairs = Pairs(found.images, encoder.pool_captions(captions, shown), torch.from_numpy(found.image_rows))
    own = np.array([group_of.get(index, -1 - index) for index in found.indices.tolist()])
    return Features(pairs, own, found.indices[found.image_rows], captions, found.skipped)


def class_pairs(resolved: Resolved, encoder: FrozenEncoder, shown: bool) -> ClassPairs | None:
    """Return the classes of the start's classifier as pairs, if it has one with names and the recipe uses them."""
    weights, wanted = resolved.weights, resolved.recipe.finetune.class_pairs
    classes = weights.named_classes() if weights is not None and wanted else None
    if classes is None:
        return None
    texts, owners = classes.texts()
    known = classes.features
    features = encoder.pool_captions(texts, shown) if known is None else known
    return ClassPairs(classes.rows, features, owners, classes.mean)


@torch.no_grad()
def set_heads(model: DualEncoder, choice: Choice, starts: bool = False) -> None:
    """Set both projections and the logit scale; dimensions beyond the number of directions are 0.

    Where the model `starts` with projections, the heads are maps of their space, and are applied after them.
    """
    if starts and choice.form == START:  # they stay as they are
        return
    for projection, rows in zip(projections(model), choice.heads, strict=True):
        weight, bias = rows.to(projection.weight), torch.zeros(len(rows)).to(projection.weight)
        if starts:
            bias = weight @ projection.bias if projection.bias is not None else bias
            weight = weight @ projection.weight
        count = min(len(rows), len(projection.weight))
        projection.weight.zero_()
        projection.weight[:count] = weight[:count]
        if projection.bias is not None:
            projection.bias.zero_()
            projection.bias[:count] = bias[:count]
    model.logit_scale.fill_(float(np.log(choice.logit_scale)))


# --- the files that the report reads


def _write_facts(
    folder: Path, source: PairSource, features: Features, choice: Choice, classes: ClassPairs | None, seed: int
) -> None:
    pairs, outcome = features.pairs, choice.outcome
    facts = {"name": source.name, "pairs": len(source), "credit": source.credit}
    worst = [] if outcome is None else _write_ranks(folder, source, features, outcome)
    write_text(folder / run_folder.EXAMPLES, json.dumps({"source": facts, "losses": {}, "views": [], "worst": worst}))
    fitted: dict[str, Any] = {
        "pairs": len(pairs.images),
        "captions": len(pairs.texts),
        "classes": 0 if classes is None else len(classes.rows),
        **choice.form._asdict(),  # method and ridge
        "class_weight": choice.class_weight,
        "logit_scale": choice.logit_scale,
    }
    if outcome is not None:
        fitted |= _measured(choice, outcome, features.groups)
        fitted["growth"] = growth(choice, len(pairs.images), seed).to_dict()
    write_text(folder / run_folder.CROSS_VALIDATION, json.dumps(fitted, indent=1))


def _measured(choice: Choice, outcome: HeldOutRanks, groups: np.ndarray) -> dict[str, Any]:
    """What cross-validation says about the heads, beside the same numbers of the start or of chance."""
    own, start = outcome.percentiles().numpy(), choice.start
    gain = group_mean(own - (0.5 if start is None else start.percentiles().numpy()), groups)
    found: dict[str, Any] = {"percentile": outcome.percentile(groups)._asdict()}
    if start is not None:
        found["percentile_of_start"] = start.percentile(groups)._asdict()
    found |= {"gain": gain._asdict(), "better": gain.low > 0}
    # Recall depends on the number of candidates, and is near 1 for any heads among a few.
    candidates = round(float(outcome.images.double().mean()))
    ks = [k for k in (1, 10) if k <= candidates / 5]
    recalls = {str(k): {**outcome.recall(k, groups)._asdict(), "chance": k / candidates} for k in ks}
    return {**found, "candidates": candidates, "recall": recalls}


def _write_ranks(folder: Path, source: PairSource, features: Features, outcome: HeldOutRanks) -> list[dict[str, Any]]:
    """Write the out-of-fold rank of each caption, the worst first: 0 is best, 1 worst; return the worst with images."""
    order = outcome.fit.argsort(descending=True, stable=True).tolist()
    rows = [(source.key(int(features.indices[row])), features.captions[row], float(outcome.fit[row])) for row in order]
    path = folder / run_folder.OUT_OF_FOLD
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "caption", "rank"])
        table.writerows((key, caption, f"{rank:.4f}") for key, caption, rank in rows)
    image_of = thumbnails_of(source)
    images = (image_of(int(features.indices[row])) for row in order[:SHOWN_WORST])
    return [
        {"key": key, "caption": caption, "rank": rank, "image": image and image._asdict()}
        for image, (key, caption, rank) in zip(images, rows, strict=False)
    ]
