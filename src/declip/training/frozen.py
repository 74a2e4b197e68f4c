"""Features of frozen towers, computed once and cached, so that training reads rows of numbers."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

from declip.data.batch import PairBatch
from declip.data.cached import CachedFeatures, VariantAssembler, content_key
from declip.data.feature_store import KEY, FeatureStore
from declip.data.images.crops import apply_photometric
from declip.data.pair import BrokenPair, PairSource
from declip.data.plan import Plan
from declip.errors import UserError
from declip.io.atomic import cache_folder
from declip.io.cache import FEATURES, LOCK, trim_cache
from declip.io.pool import in_order, naming_lost_workers, pairs_bar, usual_workers
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import chunked
from declip.models.layers import IMAGE, PROJECTIONS, TEXT
from declip.recipe.schema import Recipe
from declip.supervision.objective import active_terms

CHUNK = 64
"""Pairs that the towers see at a time."""

FEATURE_VERSION = 1
"""Increase it when preprocessing, augmentation, tokenizers or towers compute other features of the same input."""


def check_frozen(recipe: Recipe, model: DualEncoder) -> None:
    """Refuse cached features where a tower learns, or a loss reads more than pooled features."""
    if recipe.train.strategy == "fsdp":
        raise UserError("finetune.cached_views trains heads alone, too small to shard. Set train.strategy=ddp.")
    learning = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith((IMAGE, TEXT))]
    if learning := [name for name in learning if not name.startswith(PROJECTIONS)]:
        raise UserError(
            f"finetune.cached_views needs frozen towers, and '{learning[0]}' learns. Give finetune.pretrained with "
            "finetune.freeze_image_blocks=all finetune.freeze_text_blocks=all, or leave finetune.cached_views out."
        )
    of_tokens = [name for name, term in active_terms(recipe).items() if term.needs.tokens or term.needs.masked]
    if of_tokens or recipe.views.text.mask:
        keys = ", ".join([f"loss_weights.{name}" for name in of_tokens] or ["views.text.mask"])
        raise UserError(
            f"finetune.cached_views stores pooled features, and {keys} requires those of tokens or masked captions. "
            "Leave one of the two out."
        )


@torch.random.fork_rng(devices=[])  # a run that finds the features samples the dropout masks of one that computes them
@torch.no_grad()
def cached_features(
    recipe: Recipe, source: PairSource, model: DualEncoder, plan: Plan, shown: bool = True
) -> CachedFeatures:
    """Read the features of all pairs from the cache, and compute those that are missing.

    A pair is computed again when its image, its captions, the towers, the views or a library version change. A killed
    call continues where it stopped.

    Args:
        model: Both towers frozen, in training mode as the steps use it.
        shown: Show a progress bar.
    """
    variants = recipe.finetune.cached_views
    assembler = VariantAssembler(source, model.tokenizer, plan, batch_size=2, seed=0, variants=variants)
    with _open_stores(recipe, model, plan) as stores:
        # --- a key for each variant of each pair
        keys, broken = _content_keys(source, shown)
        endings = [variant.to_bytes(4) for variant in range(variants)]
        numbered = [[hashlib.blake2b(key + end, digest_size=KEY).digest() for key in keys] for end in endings]
        missing = [
            (index, variant)
            for index in range(len(source))
            for variant in range(variants)
            if index not in broken and numbered[variant][index] not in stores
        ]
        # --- features of the missing ones
        chunks = -(-len(missing) // CHUNK)
        workers = usual_workers() if chunks > 8 * usual_workers() else 0
        with pairs_bar(shown and bool(missing), "views") as bar, naming_lost_workers():
            task = bar.add_task("Features of frozen towers", total=len(missing))
            for batch, samples, faults in in_order(_Samples(assembler, missing), chunks, workers):
                broken |= faults
                if samples:
                    stores.compute([numbered[variant][index] for index, variant in samples], batch)
                bar.advance(task, len(samples) + len(faults))
    trim_cache(keep=stores.folders)
    # --- rows of every pair in every variant
    usable = np.array([index not in broken for index in range(len(source))])
    image_rows = np.full((variants, len(source)), -1, np.int64)
    text_rows = np.zeros((variants, plan.texts.count, len(source)), np.int64)
    linked = stores.links.rows()
    for variant in range(variants):
        own = [key for key, good in zip(numbered[variant], usable, strict=True) if good]
        image_rows[variant, usable] = stores.images.places(own)
        text_rows[variant][:, usable] = linked[torch.from_numpy(stores.links.places(own))].T.numpy()
    rows = stores.images.rows().view(-1, len(plan.views), model.image_tower.pre_logits_width)
    named = {spec.name: rows[:, number] for number, spec in enumerate(plan.views)}
    return CachedFeatures(named, stores.texts.rows(), image_rows, text_rows, broken, recipe.finetune.mixup)


@dataclass(frozen=True)
class _Stores:
    """The features of both towers on disk, and the towers that compute them."""

    images: FeatureStore  # (n, views · width) by variant of a pair
    texts: FeatureStore  # (m, width) by token ids
    links: FeatureStore  # (n, T) rows of `texts` by variant of a pair
    folders: tuple[Path, Path]
    model: DualEncoder
    plan: Plan
    bf16: bool

    def __contains__(self, key: bytes) -> bool:
        return key in self.images and key in self.links

    def compute(self, keys: list[bytes], batch: PairBatch) -> None:
        """Run the towers on a batch and append the features under the keys of its pairs."""
        device, padding = self.model.device, self.model.tokenizer.padding
        mean, std = (torch.tensor(values, device=device) for values in (self.plan.mean, self.plan.std))
        fresh = [number for number, key in enumerate(keys) if key not in self.images]
        pixels = [view.pixels[fresh] for view in apply_photometric(batch.to(device).views, mean, std).values()]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            features = [chunked(self.model.image_tower.pool, view) for view in pixels if fresh]
            text_keys = [[text_key(row, padding) for row in rows] for rows in batch.texts]  # T × B
            flat = zip(itertools.chain(*text_keys), batch.texts.flatten(0, 1), strict=True)
            new = {key: row for key, row in flat if key not in self.texts}
            if new:
                self.texts.append([*new], self.model.text_tower.pool(torch.stack([*new.values()]).to(device)))
        self.links.append(keys, torch.from_numpy(np.stack([self.texts.places(some) for some in text_keys], axis=1)))
        if fresh:
            self.images.append([keys[number] for number in fresh], torch.cat(features, dim=1))


@contextmanager
def _open_stores(recipe: Recipe, model: DualEncoder, plan: Plan) -> Iterator[_Stores]:
    """Open and lock the stores of both towers; another run may share one of the towers alone."""
    bf16 = recipe.train.precision == "bf16"
    dtype, width = torch.bfloat16 if bf16 else torch.float32, model.image_tower.pre_logits_width
    about = json.loads(json.dumps(asdict(plan), default=lambda section: section.model_dump()))
    first, second = (
        features_folder(f"{kind}-{tower_digest(model, tower, about, recipe.train.precision)}")
        for kind, tower in (("image", IMAGE), ("text", TEXT))
    )
    with FileLock(first / LOCK), FileLock(second / LOCK):
        images = FeatureStore(first, len(plan.views) * width, dtype)
        texts = FeatureStore(second, model.text_tower.width, dtype)
        # Row numbers of `texts`, so in its folder: removing it removes both.
        links = FeatureStore(second / first.name, plan.texts.count, torch.int64)
        yield _Stores(images, texts, links, (first, second), model, plan, bf16)


def features_folder(name: str) -> Path:
    """Make a folder for the features of a tower."""
    folder = cache_folder() / FEATURES / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _content_keys(source: PairSource, shown: bool) -> tuple[list[bytes], dict[int, BrokenPair]]:
    keys, broken = [], {}
    with pairs_bar(shown) as bar:
        for index in bar.track(range(len(source)), description="Reading pairs"):
            try:
                keys.append(content_key(source, index))
            except BrokenPair as fault:
                keys.append(b"")
                broken[index] = fault
    return keys, broken


class _Samples(Dataset):
    """Chunks of pairs in their variants, as worker processes make them."""

    def __init__(self, assembler: VariantAssembler, wanted: list[tuple[int, int]]) -> None:
        self.assembler, self.wanted = assembler, wanted

    def __getitem__(self, chunk: int) -> tuple[PairBatch, list[tuple[int, int]], dict[int, BrokenPair]]:
        samples, good, faults = [], [], {}
        for index, variant in self.wanted[chunk * CHUNK : (chunk + 1) * CHUNK]:
            try:
                samples.append(self.assembler.sample(index, variant))
                good.append((index, variant))
            except BrokenPair as fault:
                faults[index] = fault
        return self.assembler.collate(samples, []), good, faults


def text_key(row: Tensor, padding: int) -> bytes:
    """Hash token ids (L,) without the padding at their end."""
    ids = row.numpy()
    length = int(np.flatnonzero(ids != padding).max(initial=-1)) + 1
    return hashlib.blake2b(ids[:length].tobytes(), digest_size=KEY).digest()


def tower_digest(model: DualEncoder, tower: str, *about: Any) -> str:
    """Hash a tower's weights except the projection, its recipe section, and whatever else its features depend on."""
    # Equal weights may compute other features: with another pooling, activation or number of heads, or in other code.
    section = None if model.recipe is None else (model.recipe.image if tower == IMAGE else model.recipe.text)
    known = [section and section.model_dump(mode="json"), about, feature_versions()]
    digest = hashlib.sha256(json.dumps(known).encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(tower) and not name.startswith(PROJECTIONS):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def feature_versions() -> dict[str, str | int]:
    """The versions of the code that features depend on; Pillow decodes and resizes the images."""
    return {
        "features": FEATURE_VERSION,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }
