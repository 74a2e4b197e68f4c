"""Experiment 2, a prototype: few captioned icons, all other icons without captions, equal CPU seconds.

    python bare.py time            # CPU seconds a step of every arm, in turns
    python bare.py run --arms clip,simclr-first,simclr-together,neighbor --pairs 1000 --seeds 0
"""
import argparse, json, math, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
from declip.comparison.trials import WITHOUT_EVALUATION
from declip.data.assembly import Assembler
from declip.data.builtin import open_builtin
from declip.data.images.crops import apply_photometric
from declip.data.images.preprocess import Preprocess
from declip.data.plan import plan_views
from declip.data.sources.subset import Subset
from declip.evaluation.zero_shot import class_features
from declip.supervision.contrastive import cross_entropy_to_keys, info_nce
from declip.supervision.objective import encode_views
from declip.supervision.simclr import SimCLR, nt_xent
from declip.supervision.simsiam import SimSiam, negative_cosine
from declip.training.assemble import assemble
from declip.training.optimizer import build_optimizer, learning_rate
from declip.training.resolve import resolve_recipe
from declip.training.step import StepParts

HERE = Path("/tmp/pays")
# Views of a bare image: a crop of at least a third, color changes, blur; the pairs have those of demo-clip.
STRONG = {"views.image.scale": "[0.35, 1.0]", "views.image.color_jitter": "[0.4, 0.4, 0.4, 0.1]", "views.image.blur_prob": 0.5,
          "views.image.hflip_prob": 0.5}
ARMS = ("clip", "simclr-first", "simsiam-first", "simclr-together", "neighbor")


class Run:
    def __init__(self, pairs, seed, folder, steps=1000):
        given = {**WITHOUT_EVALUATION, "data.source": "builtin:icons", "data.max_pairs": pairs, "seed": seed, "train.steps": steps,
                 "data.columns": {}}
        given.pop("data.columns")
        self.parts = assemble(resolve_recipe("demo-clip", given), folder, quiet=True)
        self.recipe, self.model = self.parts.recipe, self.parts.model
        self.step_parts = StepParts(self.parts.learner, self.parts.optimizer, self.parts.plan, self.recipe.train)
        strong = resolve_recipe("demo-slip", {**given, **STRONG})
        whole = open_builtin("icons")
        paired = self.parts.source.indices
        rest = np.setdiff1d(np.arange(len(whole)), paired)
        plan = plan_views(strong, [SimCLR.needs])
        self.batch = self.recipe.train.batch_size
        self.bare = {size: Assembler(Subset(whole, rest), self.model.tokenizer, plan, batch_size=size, seed=seed) for size in (self.batch, self.batch // 2)}
        torch.manual_seed(seed + 1)
        self.simclr, self.simsiam = SimCLR(strong, self.model), SimSiam(resolve_recipe("demo-declip", given), self.model)
        self.paired_assembler = {size: Assembler(self.parts.source, self.model.tokenizer, self.parts.plan, batch_size=size, seed=seed) for size in (self.batch, self.batch // 2)}
        n, d = pairs, self.recipe.embed_dim
        self.keys, self.texts, self.seen = torch.zeros(n, d), torch.zeros(n, d), torch.zeros(n, dtype=torch.bool)
        self.bare_step = 0

    def optimizer(self, *modules):
        named = [(f"m{i}.{name}", p) for i, m in enumerate(modules) for name, p in m.named_parameters() if p.requires_grad]
        names = [("model." + name.split(".", 1)[1] if name.startswith("m0.") else "objective." + name, p) for name, p in named]
        return build_optimizer(names, self.recipe.train)

    def pixels(self, batch):
        p = self.step_parts
        return [v.pixels for v in apply_photometric(batch.views, p.mean, p.std).values()]

    def bare_views(self, size):
        batch = self.bare[size][self.bare_step]
        self.bare_step += 1
        return self.pixels(batch)

    def clip_loss(self, step, size):
        batch = self.paired_assembler[size][step]
        images = encode_views(self.model, self.pixels(batch)[:1]).pooled[0]
        texts = self.model.text_tower(batch.texts[0]).pooled
        image, text = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        with torch.no_grad():
            rows = batch.sample_ids % len(self.parts.source)
            self.keys[rows], self.texts[rows], self.seen[rows] = image.detach(), text.detach(), True
        return info_nce(image, text, image, text, self.model.logit_scale.exp(), 0, None, 0.1)

    def simclr_loss(self, size):
        out = encode_views(self.model, self.bare_views(size))
        z1, z2 = (self.simclr.head(v) for v in out.pre_logits)
        return nt_xent(z1, z2, z1, z2)

    def simsiam_loss(self, size):
        out = encode_views(self.model, self.bare_views(size))
        z1, z2 = (self.simsiam.projector(v) for v in out.pooled)
        return negative_cosine(self.simsiam.predictor(z1), self.simsiam.predictor(z2), z1, z2)

    def neighbor_loss(self, size):
        """The stored caption feature of the nearest paired image is the bare image's; the surer half counts."""
        out = encode_views(self.model, self.bare_views(size)[:1]).pooled[0]
        image = F.normalize(out.float(), dim=-1)
        if int(self.seen.sum()) < 2 * size:
            return image.sum() * 0
        seen = self.seen.nonzero().squeeze(1)
        with torch.no_grad():
            cosine, nearest = (image @ self.keys[seen].mT).max(1)
            sure = cosine.topk(len(image) // 2).indices
        target = self.texts[seen[nearest[sure]]]
        return cross_entropy_to_keys(image[sure], target, self.model.logit_scale.exp(), 0, None, 0.1)

    def loss(self, arm, step):
        half = self.batch // 2
        if arm == "clip":
            return self.clip_loss(step, self.batch)
        if arm == "simclr":
            return self.simclr_loss(self.batch)
        if arm == "simsiam":
            return self.simsiam_loss(self.batch)
        if arm == "simclr-together":
            return self.clip_loss(step, half) + self.simclr_loss(half)
        if arm == "neighbor":
            return self.clip_loss(step, half) + 0.5 * self.neighbor_loss(half)
        raise SystemExit(arm)

    def phase(self, arm, steps, stop_after=None):
        train = self.recipe.train.model_copy(update={"steps": steps, "warmup_steps": max(10, steps // 8)})
        model = self.model
        trains = {"simclr": (model.image_tower, self.simclr), "simsiam": (model.image_tower, self.simsiam),
                  "simclr-together": (model, self.simclr)}.get(arm, (model,))
        optimizer = self.optimizer(*trains)
        model.train(), self.simclr.train(), self.simsiam.train()
        seconds, loss = [], None
        for step in range(steps if stop_after is None else stop_after):
            began = time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, train)
            optimizer.zero_grad(set_to_none=True)
            with self.step_parts.autocast():
                loss = self.loss(arm, step)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(min=self.recipe.logit_scale.min, max=self.recipe.logit_scale.max)
            seconds.append(time.process_time() - began)
        return seconds, float(loss)


@torch.no_grad()
def measure(model):
    model.eval()
    out = {}
    for name in ("icons-validation", "icons-test"):
        source = open_builtin(name)
        path = HERE / "pixels" / f"{name}-all.pt"
        if not path.exists():
            prep = Preprocess(32, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
            torch.save(prep([source.image(i) for i in range(len(source))]).half(), path)
        x = torch.cat([model.encode_image(p) for p in torch.load(path).float().split(256)])
        classes = class_features(model, source.class_names, ["{}"])
        y = torch.from_numpy(source.labels)
        cos = x @ classes.mT  # (n, C)
        own = cos.gather(1, y[:, None])
        rank = 1 + (cos > own).sum(1)
        out[f"{name} top-1"], out[f"{name} top-10"] = ((rank <= k).float().mean().item() for k in (1, 10))
        # text to image: the best-ranked image of a name among all
        order = cos.mT.argsort(1, descending=True)[:, :10]
        hits = (y[order] == torch.arange(len(classes))[:, None]).any(1)
        out[f"{name} R@10"] = (out[f"{name} top-10"] + hits.float().mean().item()) / 2
    return {k: round(v, 5) for k, v in out.items()}


def commit():
    return "498abe7"
    return subprocess.run(["git", "-C", ".", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "run"))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--pairs", default="1000")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budget", type=int, default=600, help="steps of clip")
    parser.add_argument("--first", type=float, default=0.6)
    parser.add_argument("--out", default=str(HERE / "bare.jsonl"))
    args = parser.parse_args()
    if args.what == "time":
        times = {arm: [] for arm in ("clip", "simclr", "simsiam", "simclr-together", "neighbor")}
        with tempfile.TemporaryDirectory() as f:
            run = Run(1000, 0, Path(f) / "r")
            for turn in range(3):
                for arm in times:
                    times[arm].append(median(run.phase(arm, 1000, 6)[0][2:]))
                    print(turn, arm, round(times[arm][-1], 4), flush=True)
        ratios = {arm: round(median(a / b for a, b in zip(times[arm], times["clip"])), 3) for arm in times}
        (HERE / "bare-seconds.json").write_text(json.dumps({"seconds": {a: [round(x, 4) for x in v] for a, v in times.items()}, "ratio": ratios}))
        print(ratios)
        return
    ratio = json.loads((HERE / "bare-seconds.json").read_text())["ratio"]
    out = Path(args.out)
    if not out.exists():
        out.write_text(json.dumps({"command": "python " + " ".join(sys.argv), "commit": commit(), "date": "2026-11-29", "ratio": ratio}) + "\n")
    for seed in map(int, args.seeds.split(",")):
        for pairs in map(int, args.pairs.split(",")):
            for arm in args.arms.split(","):
                done = {(r["arm"], r["pairs"], r["seed"], r["budget"]) for r in map(json.loads, out.read_text().splitlines()[1:])}
                if (arm, pairs, seed, args.budget) in done:
                    continue
                began, cpu = time.time(), time.process_time()
                with tempfile.TemporaryDirectory() as f:
                    run = Run(pairs, seed, Path(f) / "r")
                    if arm.endswith("-first"):
                        kind = arm.removesuffix("-first")
                        plan = [(kind, int(args.first * args.budget / ratio[kind])), ("clip", int((1 - args.first) * args.budget))]
                    else:
                        plan = [(arm, int(args.budget / ratio[arm]))]
                    losses = {}
                    for kind, steps in plan:
                        losses[kind] = round(run.phase(kind, steps)[1], 3)
                    middle = time.process_time()
                    row = {"arm": arm, "pairs": pairs, "seed": seed, "budget": args.budget, "steps": dict(plan), "last_loss": losses,
                           "cpu_seconds": round(middle - cpu, 1), "wall_seconds": round(time.time() - began, 1), **measure(run.model)}
                    if arm in ("clip", "simclr-first"):
                        (HERE / "models").mkdir(exist_ok=True)
                        torch.save(run.model.state_dict(), HERE / "models" / f"bare-{arm}-{pairs}-{seed}.pt")
                with out.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


main()
