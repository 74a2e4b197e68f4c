"""Scenes of several emoji: where five recipes point, and what they find, after equal time on one thread.

    declip data download builtin:scenes
    python benchmarks/pays/scenes.py --seeds 0 1 2 --out scenes.jsonl

A step of demo-slip, demo-declip, demo-filip and demo-defilip with 128 scenes of 96 px took 1.68, 1.69, 2.54 and 3.97
times as long as one of demo-clip (two rounds in turns, processor seconds), so each gets fewer of them.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from declip.data.builtin.sets import open_builtin
from declip.evaluation.datasets import open_dataset
from declip.evaluation.pointing import measure_pointing
from declip.training.assemble import assemble, resolve_recipe
from declip.training.trainer import Trainer

STEPS = {"demo-clip": 400, "demo-declip": 237, "demo-slip": 238, "demo-filip": 158, "demo-defilip": 101}
DEFILIP = {"contrastive": 0.1, "multi_view": 0.3, "simsiam": 0.2, "masked_language": 0.2, "nearest_neighbor": 0.2}
# Two arms are demo-clip with other losses.
LOSSES = {"demo-filip": {"late_interaction": 1.0}, "demo-defilip": {**DEFILIP, "late_interaction": 0.2}}
SIDE, RERANKED = 96, 200
SETTINGS = {
    **{"image.size": SIDE, "views.image.hflip_prob": 0.0, "train.batch_size": 128, "train.evaluate_every": 0},
    **{f"evaluation.{key}": [] for key in ("zero_shot", "retrieval", "final_zero_shot", "final_retrieval")},
}


def place(one, other, boxes):
    (x, y, *_), (u, v, *_) = boxes[one], boxes[other]
    side = ("left of" if x < u else "right of") if abs(x - u) > abs(y - v) else ("above" if y < v else "below")
    return f"{one} {side} {other}"


def found(order, wanted):
    return bool(set(order[:10].tolist()) & wanted)


@torch.no_grad()
def measure(model, late, name):
    """Pointing, retrieval by one name and by all names, whether the order of two names matters, and re-ranking."""
    source, pointing = open_builtin(name), measure_pointing(model.eval(), open_dataset(f"builtin:{name}"))
    images, patches, captions, names, relation, late_hits = [], [], [], {}, [], []
    for index in range(len(source)):
        boxes, pixels = dict(source.boxes(index)), model.preprocess(source.image(index))
        features = model.image_tower(pixels)
        images.append(F.normalize(features.pooled.float(), dim=-1)[0])
        one, other = list(boxes)[:2]
        right = place(one, other, boxes)
        wrong = place(other, one, {one: boxes[other], other: boxes[one]})
        texts = model.text_tower(model.tokenize([*boxes, right, wrong, source.captions(index)[0]]))
        embedded = F.normalize(texts.pooled.float(), dim=-1)
        relation.append(float(images[-1] @ (embedded[-3] - embedded[-2])) > 0)
        words = [None] * len(embedded)
        if late is not None:
            patches.append(F.normalize(late.patch_projection(features.tokens.float()), dim=-1)[0])
            tokens = F.normalize(late.word_projection(texts.text_tokens.float()), dim=-1)
            words = [states[:length] for states, length in zip(tokens, texts.lengths.tolist(), strict=True)]
            for states, (left, top, right_side, bottom) in zip(words, boxes.values(), strict=False):
                grid = (states @ patches[-1].mT).mean(0).view(1, 1, math.isqrt(len(patches[-1])), -1)
                y, x = divmod(int(F.interpolate(grid, (SIDE, SIDE), mode="bilinear").argmax()), SIDE)
                late_hits.append(left <= x < right_side and top <= y < bottom)
        captions.append((embedded[-1], {index}, words[-1]))
        for text, vector, states in zip(boxes, embedded, words, strict=False):
            names.setdefault(text, (vector, set(), states))[1].add(index)
    images = torch.stack(images)
    row = {"pointing": pointing.pointing, "IoU": pointing.iou, "chance": pointing.chance, "n": pointing.n}
    row |= {"relation": np.mean(relation), "objects": len(names)}
    for title, queries in (("object", [*names.values()]), ("caption", captions)):
        orders = [(images @ vector).argsort(descending=True) for vector, _, _ in queries]
        row[f"{title} R@10"] = np.mean([found(order, q[1]) for order, q in zip(orders, queries, strict=True)])
        if late is not None:
            again = []
            for order, (_, wanted, states) in zip(orders, queries, strict=True):
                scores = torch.einsum("ld,npd->nlp", states, torch.stack(patches)[order[:RERANKED]])
                both = scores.max(2).values.mean(1) + scores.max(1).values.mean(1)
                again.append(found(order[both.argsort(descending=True)], wanted))
            row[f"{title} R@10, re-ranked by tokens"] = np.mean(again)
    if late is not None:
        row["pointing by tokens"] = np.mean(late_hits)
    return {key: round(float(value), 4) for key, value in row.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", default=[*STEPS])
    parser.add_argument("--sets", nargs="+", default=["scenes-validation", "scenes-test", "scenes-test-new"])
    parser.add_argument("--runs", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for recipe in options.recipes:
            steps, started = STEPS[recipe], time.process_time()
            given = {"train.steps": steps, "train.warmup_steps": min(100, steps // 5), "seed": seed}
            given |= {f"loss_weights.{name}": weight for name, weight in LOSSES.get(recipe, {}).items()}
            shipped = "demo-clip" if recipe in LOSSES else recipe
            resolved = resolve_recipe(shipped, {**SETTINGS, **given}, "builtin:scenes", [])
            parts = assemble(resolved, options.runs / f"{recipe}-{seed}", True, True)
            Trainer(parts).train(None)
            row = {
                "recipe": recipe,
                "seed": seed,
                "steps": steps,
                "cpu_seconds": round(time.process_time() - started, 1),
            }
            terms = dict(parts.learner.objective.terms.items())
            for name in options.sets:
                row[name] = measure(parts.learner.model, terms.get("late_interaction"), name)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


main()
