"""How well the Pairs page finds wrong captions: planted ones in built-in sets, by rank and by cosine.

    python benchmarks/wrong_pairs.py emoji-test clipart stamps-photos --work work --out wrong-pairs.jsonl

Captions of a share of the images are exchanged with each other. Ranks are out-of-fold, of `declip finetune` on all
pairs, the wrong ones too; "index" rows are of the same pairs by the start, which is fitted to none. The preset of the
page lists the worst 2 % of the captions; of ranks only those above 0.5.
"""

import argparse
import csv
import json
import logging
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

import declip
from declip.data.sources.open import open_source
from declip.runs.fitted import FittedRun

SHARES = (0.0, 0.05, 0.1, 0.2)
COUNT = 250  # pairs of a draw
SEEDS = 3
GRID = np.round(np.arange(0.3, 1, 0.05), 2)  # thresholds of ranks
LISTED, LEAST = 0.98, 0.5  # quantile of the preset, and its smallest rank


def draw(name: str, seed: int, folder: Path) -> tuple[list[Path], list[str]]:
    """Write the images of a draw; return their paths and their first captions, which all differ."""
    source = open_source(f"builtin:{name}")
    order = np.random.default_rng(seed).permutation(len(source))
    by_caption: dict[str, int] = {}
    for index in order.tolist():
        by_caption.setdefault(source[index].captions()[0], index)
        if len(by_caption) == COUNT:
            break
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in by_caption.values():
        path = folder / f"{index:05d}.png"
        if not path.exists():
            source[index].open().decoded().save(path)
        paths.append(path)
    return paths, list(by_caption)


def exchange(count: int, share: float, seed: int) -> np.ndarray:
    """(n,) the number of the caption that each image gets; a share of the images has another's."""
    order = np.arange(count)
    wrong = np.random.default_rng(1_000 + seed).permutation(count)[: round(share * count)]
    order[wrong] = np.roll(wrong, 1)
    return order


def out_of_fold(paths: list[Path], captions: list[str], folder: Path) -> np.ndarray:
    """(n,) out-of-fold ranks of `declip finetune`, 0 best and 1 worst."""
    folder.mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        table.writerows(
            (path.resolve(), caption) for path, caption in zip(paths, captions, strict=True)
        )
    run = declip.finetune(
        folder / "pairs.csv", weights="builtin:lite2-minilm", out=folder / "run", progress=False
    )
    assert isinstance(run, FittedRun), "the start is frozen"
    by_name = {Path(key).name: rank for (key, _), rank in run.caption_ranks.items()}
    ranks = np.array([by_name[path.name] for path in paths])
    shutil.rmtree(folder)
    return ranks


def mean_ranks(cosines: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """(n,) the mean rank of image and caption for each other among all (n, n), 0 best and 1 worst."""
    own = cosines[np.arange(len(owners)), owners]
    for_image = (cosines > own[:, None]).sum(axis=1)
    for_caption = (cosines[:, owners] > own[None]).sum(axis=0)
    return (for_image + for_caption) / 2 / (len(owners) - 1)


def listed(values: np.ndarray, wrong: np.ndarray, ranks: bool) -> dict[str, list]:
    """Numbers of right and wrong captions above the preset, and above each threshold of ranks."""
    preset = np.quantile(values, LISTED)
    thresholds = np.array([max(LEAST, preset), *GRID]) if ranks else np.array([preset])
    above = values[None] > thresholds[:, None]
    return {
        "thresholds": np.round(thresholds, 4).tolist(),
        "right_listed": (above & ~wrong).sum(axis=1).tolist(),
        "wrong_listed": (above & wrong).sum(axis=1).tolist(),
    }


def measure(name: str, seed: int, work: Path) -> list[dict]:
    """Rows of a draw: all shares by out-of-fold rank, by rank in an index, and by cosine in an index."""
    paths, captions = draw(name, seed, work / name)
    table = work / f"{name}-{seed}.csv"
    table.write_text(
        "image,caption\n" + "".join(f'{path.resolve()},"{n}"\n' for n, path in enumerate(paths))
    )
    index = declip.embed(
        "builtin:lite2-minilm", table, out=work / f"{name}-{seed}-index", workers=0
    )
    order = np.argsort([int(row.caption) for row in index.rows(index.ids)])
    images = index.vectors(index.ids[order]).numpy()
    texts = np.stack([index.query(caption).numpy() for caption in captions])
    cosines = images @ texts.T
    rows = []
    for share in SHARES:
        owners = exchange(len(paths), share, seed)
        wrong = owners != np.arange(len(paths))
        ranks = out_of_fold(paths, [captions[owner] for owner in owners], work / "fit")
        own = cosines[np.arange(len(owners)), owners]
        values = {
            "out-of-fold rank": ranks,
            "index rank": mean_ranks(cosines, owners),
            "index cosine": -own,
        }
        about = {
            "set": name,
            "seed": seed,
            "share": share,
            "right": int((~wrong).sum()),
            "wrong": int(wrong.sum()),
        }
        for by, each in values.items():
            rows.append({**about, "by": by, **listed(each, wrong, ranks=by != "index cosine")})
    return rows


def main() -> None:
    """Measure the sets, and write a row for each draw and share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=Path("wrong-pairs.jsonl"))
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    sets = " ".join(given.sets)
    head = {
        "command": f"python benchmarks/wrong_pairs.py {sets} --work work --out wrong-pairs.jsonl",
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "pairs": COUNT,
    }
    with given.out.open("w") as file:
        file.write(json.dumps(head) + "\n")
        for name in given.sets:
            for seed in range(SEEDS):
                for row in measure(name, seed, given.work):
                    file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
