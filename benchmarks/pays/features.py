"""Experiment 1: features of CLIP and DeCLIP for captions at equal compute.

    python features.py measure > seconds.json; python features.py run --steps demo-clip=400,demo-declip=218
"""
import argparse, json, shutil, subprocess, sys, time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import normalize, one_hot

torch.set_num_threads(1)
import declip
from declip.comparison.trials import WITHOUT_EVALUATION
from declip.data.builtin import open_builtin
from declip.data.images.preprocess import Preprocess
from declip.evaluation.few_shot import Examples, FewShotForm, fit_heads
from declip.evaluation.per_class import sample_per_class
from declip.evaluation.zero_shot import class_features
from declip.training.assemble import assemble
from declip.training.resolve import resolve_recipe
from declip.training.trainer import Trainer

HERE = Path("/tmp/pays")
SHOTS, DRAWS = (1, 2, 5, 10), 5


def corrupt(kind, image, number):
    """One corruption of an RGB image over white; strengths are relative to its side."""
    side = image.width
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(side / 24))
    if kind == "jpeg":  # at the model's size, quality 15
        small = image.resize((32, 32), Image.Resampling.BICUBIC)
        stream = BytesIO()
        small.save(stream, "JPEG", quality=15)
        return Image.open(stream).convert("RGB")
    if kind == "rotation":
        return image.rotate(30 if number % 2 else -30, Image.Resampling.BICUBIC, fillcolor="white")
    if kind == "half":  # the left or right half; the rest white
        out = Image.new("RGB", image.size, "white")
        box = (0, 0, side // 2, side) if number % 2 else (side // 2, 0, side, side)
        out.paste(image.crop(box), box[:2])
        return out
    if kind == "inverted":
        return Image.fromarray(255 - np.asarray(image))
    return image


CORRUPTIONS = ("blur", "jpeg", "rotation", "half", "inverted")


def pixels_of(name, kind="plain", rows=None):
    """(n, 3, 32, 32) normalized, cached."""
    path = HERE / "pixels" / f"{name}-{kind}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        source = open_builtin(name)
        prep = Preprocess(32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        rows = range(len(source)) if rows is None else rows
        torch.save(prep([corrupt(kind, source.image(i), i) for i in rows]).half(), path)
    return torch.load(path).float()


def probe_sets():
    """name → (train set, train rows, labels, test set, test rows, labels)."""
    out = {}
    for title, train, test, key in (
        ("emoji by category", "emoji-validation", "emoji-test", "category"),
        ("emoji by name", "emoji-validation", "emoji-test", "code"),
        ("icons by group", "icons", "icons-test", "category"),
        ("stamps by kind", "stamps-kinds-train", "stamps-kinds", "kind"),
    ):
        given = [[row[key] for row in open_builtin(s).rows] for s in (train, test)]
        counts = [Counter(g) for g in given]
        least = 1 if key == "code" else 10 if title[0] == "e" else 8
        names = [n for n, c in counts[0].most_common() if n and c >= least and counts[1][n] >= (1 if key == "code" else 3)]
        if title[0] == "i":
            names = [n for n in names if counts[0][n] > 16 and counts[1][n] > 9][:12]
        parts = []
        for labels in given:
            rows = np.array([i for i, label in enumerate(labels) if label in set(names)])
            numbers = np.array([names.index(labels[i]) for i in rows])
            kept = sample_per_class(numbers, lambda count: min(count, 60)) if title[0] == "i" else np.arange(len(rows))
            parts.append((rows[kept], numbers[kept]))
        out[title] = (train, *parts[0], test, *parts[1], len(names))
    return out


@torch.no_grad()
def encode(model, pixels):
    outs = [model._encode(part) for part in pixels.split(256)]
    return torch.cat([o.pre_logits.float() for o in outs]), torch.cat([o.pooled.float() for o in outs])


@torch.no_grad()
def measure(model):
    model.eval()
    out, stored = {}, {}

    def pix_rows(name, rows, title):
        path = HERE / "pixels" / f"{name}~{title.split()[-1]}-plain.pt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            source = open_builtin(name)
            prep = Preprocess(32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
            torch.save(prep([source.image(int(i)) for i in rows]).half(), path)
        return torch.load(path).float()

    def some(name, rows, title):
        if name.startswith("icons"):
            return encode(model, pix_rows(name, rows, title))
        if name not in stored:
            stored[name] = encode(model, pixels_of(name))
        return tuple(half[torch.from_numpy(rows)] for half in stored[name])

    # --- probes
    for title, (train, rows, labels, test, test_rows, test_labels, count) in probe_sets().items():
        a, b = some(train, rows, title), some(test, test_rows, title)
        labels, test_labels = torch.from_numpy(labels), torch.from_numpy(test_labels)
        sizes = np.bincount(labels.numpy(), minlength=count)
        for which, (x, y) in (("backbone", (a[0], b[0])), ("embedding", (a[1], b[1]))):
            x, y = normalize(x, dim=-1), normalize(y, dim=-1)
            for shots in SHOTS if "name" not in title else (1,):
                knn, probe = [], []
                for draw in range(DRAWS if "name" not in title else 1):
                    rng = np.random.default_rng((draw, shots))
                    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels.numpy() == c))[:shots] for c in range(count)])
                    xs, ls = x[chosen], labels[chosen]
                    cos = y @ xs.mT
                    k = 1 if shots < 5 else 5
                    top = cos.topk(k, dim=1)
                    votes = torch.zeros(len(y), count).scatter_add_(1, ls[top.indices], (top.values / 0.07).exp())
                    knn.append((votes.argmax(1) == test_labels).float().mean().item())
                    if "name" not in title:
                        ex = Examples(xs, ls, torch.randn(count, 1), xs.shape[1])
                        # the halves: all width before the projection, one empty column
                        ex = ex._replace(images=torch.cat([xs, torch.ones(len(xs), 1)], 1))
                        (head,) = fit_heads(ex, (FewShotForm(0.0, 0.3),))
                        scores = head.scores(torch.cat([y, torch.ones(len(y), 1)], 1))
                        probe.append((scores.argmax(1) == test_labels).float().mean().item())
                out[f"{title}, {shots}, {which}, knn"] = round(float(np.mean(knn)), 5)
                if probe:
                    out[f"{title}, {shots}, {which}, linear"] = round(float(np.mean(probe)), 5)
    # --- zero-shot under corruptions
    source = open_builtin("emoji-test")
    classes = class_features(model, source.class_names, ["{}"])
    y = torch.from_numpy(source.labels)
    for kind in ("plain", *CORRUPTIONS):
        x = normalize((stored["emoji-test"] if kind == "plain" else encode(model, pixels_of("emoji-test", kind)))[1], dim=-1)
        out[f"top-1, {kind}"] = round(((x @ classes.mT).argmax(1) == y).float().mean().item(), 5)
    return out


def commit():
    return "498abe7"
    return subprocess.run(["git", "-C", ".", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", default="demo-clip=400,demo-declip=218")
    parser.add_argument("--pairs", default="1400,5600,2800")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--out", default=str(HERE / "features.jsonl"))
    args = parser.parse_args()
    out = Path(args.out)
    if not out.exists():
        out.write_text(json.dumps({"command": "python " + " ".join(sys.argv), "commit": commit(), "date": "2026-11-29"}) + "\n")
    done = {(r["recipe"], r["pairs"], r["seed"]) for r in map(json.loads, out.read_text().splitlines()[1:])}
    steps = dict(item.split("=") for item in args.steps.split(","))
    for pairs in map(int, args.pairs.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for recipe, count in steps.items():
                if (recipe, pairs, seed) in done:
                    continue
                began, cpu = time.time(), time.process_time()
                # each arm warms up for an eighth of its steps
                given = {**WITHOUT_EVALUATION, "train.steps": int(count), "data.max_pairs": pairs, "seed": seed,
                         "train.warmup_steps": int(count) // 8, "train.checkpoint_every": 10**6}
                folder = HERE / "runs" / f"{recipe}-{pairs}-{seed}"
                parts = assemble(resolve_recipe(recipe, given), folder, resume=True, quiet=True)
                Trainer(parts).train()
                middle = time.process_time()
                row = {"recipe": recipe, "pairs": pairs, "seed": seed, "steps": int(count), "cpu_seconds": round(middle - cpu, 1),
                       "wall_seconds": round(time.time() - began, 1)}
                row["results"] = measure(parts.model)
                row["evaluation_cpu_seconds"] = round(time.process_time() - middle, 1)
                with out.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                print(row["recipe"], pairs, seed, row["cpu_seconds"], row["evaluation_cpu_seconds"], {k: v for k, v in row["results"].items() if "top-1" in k or ", 5, backbone" in k}, flush=True)


main()
