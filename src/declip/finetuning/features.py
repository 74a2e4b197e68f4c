"""Features of frozen towers, computed once and saved by a key of their input."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import PIL
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from declip.closed_form.solve import ClassPairs, Pairs
from declip.data.images.preprocess import Preprocess
from declip.data.pair import Pair, PairSource, SkipCounter
from declip.errors import UserError
from declip.evaluation.encode import SourceFeatures, encode_batches, encode_source, text_features
from declip.inspection.reading import PairRow, ReadPairs, row_of
from declip.inspection.split import related_pairs
from declip.io.atomic import cache_folder
from declip.io.cache import FEATURES, hold, trim_cache
from declip.io.pool import usual_workers
from declip.models.dual_encoder import DualEncoder
from declip.models.fingerprint import hash_tensors
from declip.models.image_tower import PosteriorProjection
from declip.models.inference import chunked, normalized
from declip.models.layers import IMAGE, PROJECTIONS, TEXT
from declip.models.precision import TYPES, pooling_tower
from declip.recipe.schema import Recipe
from declip.training.assemble import Resolved

KEY, FILE = 16, "features.sqlite"  # bytes of a key; file of a tower
BATCH = 64  # images or captions that a tower sees at a time
MANY = 200  # pairs from which on processes read the images
FEATURE_VERSION = 4  # increase it when preprocessing, tokenizers or towers compute other features of the same input


class FrozenEncoder:
    """A model for `declip.evaluation.protocols.evaluate_all` with pooled features in the cache folder.

    Their key is the tower's weights and the pixels or token ids, so that another run with the same towers, or
    a later evaluation of this one, computes its heads alone. Heads are fitted to features in a `precision`, "fp32" or
    "bf16", as training computes them, of images that are resized as for a search; all others are float32, of exact
    pixels.
    """

    def __init__(self, model: DualEncoder, precision: str = "fp32") -> None:
        self.model, key = model, partial(text_key, padding=model.tokenizer.padding)
        self.preprocessor, self.preprocess = model.preprocessor, model.preprocess
        self.tokenizer, self.tokenize = model.tokenizer, model.tokenize
        self.modules, self.parameters, self.logit_scale = model.modules, model.parameters, model.logit_scale
        images, texts = (cache_folder() / FEATURES / f"pooled-{tower_digest(model, tower)}" for tower in (IMAGE, TEXT))
        rounded = images.with_name(f"{images.name}-{precision}")
        self._images = self._fitted = PooledFeatures(images, _pixel_key, image_pool(model, "fp32"))
        if precision != "fp32":
            self._fitted = PooledFeatures(rounded, _pixel_key, image_pool(model, precision))
        self._texts = PooledFeatures(texts, key, model.text_tower.pool)
        self._sources = dict[PairSource, SourceFeatures]()
        trim_cache(FEATURES, keep=[images, rounded, texts])

    def pool_fitted(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) uint8 → (n, v) float32, before the projection, computed in the precision of training."""
        return self._fitted.of(images)

    def pool_images(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, v) float32, before the projection."""
        return self._images.of(images)

    def pool_captions(self, captions: Sequence[str], shown: bool = False) -> Tensor:
        """(m, w) float32, before the projection; rows of equal captions equal bit for bit."""
        return text_features(self.model, captions, encode=self._texts.of, batch_size=BATCH, progress=shown)

    @torch.no_grad()
    def source_features(self, source: PairSource, **options: Any) -> SourceFeatures:
        """Features of the images of a source, which is read once, whatever the projection is later."""
        if source not in self._sources:
            self._sources[source] = encode_source(self, source, encode=self.pool_images, texts=False, **options)
        known = self._sources[source]
        return replace(known, images=torch.cat([self._project(part).cpu() for part in known.images.split(8_192)]))

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, d) float32 of length 1."""
        return self._project(self._images.of(images))

    def _project(self, pooled: Tensor) -> Tensor:
        return normalize(self.model.image_tower.proj(pooled.to(self.logit_scale.device)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        return normalize(self.model.text_tower.text_projection(self._texts.of(tokens)).float(), dim=-1)


class PooledFeatures:
    """The pooled features of a tower by its input, in SQLite; the tower runs only on inputs that are missing."""

    def __init__(self, folder: Path, key: Callable[[Tensor], bytes], pool: Callable[[Tensor], Tensor]) -> None:
        self.folder, self.key, self.pool = folder, key, pool
        with self._database():
            self._held = hold(folder)
        with suppress(OSError):  # of a read-only cache
            os.utime(folder)  # `declip.io.cache` removes what was opened longest ago

    def of(self, batch: Tensor) -> Tensor:
        """(n, …) inputs → (n, w) float32."""
        keys = [self.key(row) for row in batch.cpu()]
        with self._database() as file:
            saved = {key: file.execute("SELECT row FROM features WHERE key = ?", (key,)).fetchone() for key in keys}
        rows = {key: row[0] for key, row in saved.items() if row is not None}
        if new := {key: number for number, key in enumerate(keys) if key not in rows}:
            features = self.pool(batch[[*new.values()]]).float().cpu().numpy()
            computed = [*zip(new, (row.tobytes() for row in features), strict=True)]
            rows |= computed
            with self._database() as file:
                file.executemany("INSERT OR IGNORE INTO features VALUES (?, ?)", computed)
        content = bytearray(b"".join(rows[key] for key in keys))
        return torch.frombuffer(content, dtype=torch.float32).view(len(keys), -1).to(batch.device)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction: what a killed process did not finish is undone by the next one."""
        try:
            # Also what was removed from outside, which costs the features and not the run
            self.folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.folder / FILE, timeout=60)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, row BLOB NOT NULL)")
                yield file
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"The features in '{self.folder}' cannot be read or written: {error}. Make room on the disk, run "
                "`declip cache clear`, or set DECLIP_CACHE to a folder on another disk."
            ) from error


def image_pool(model: DualEncoder, precision: str) -> Callable[[Tensor], Tensor]:
    """A function of images whose tower is built at its first call: all features may be known."""
    tower = cache(partial(pooling_tower, model, TYPES[precision]))

    def pool(images: Tensor) -> Tensor:
        return tower().pool(normalized(model, images).to(next(tower().parameters()).dtype))

    return partial(chunked, pool)


def _pixel_key(pixels: Tensor) -> bytes:
    # Processors compute SHA-256, which takes half the time of BLAKE2
    return hashlib.sha256(pixels.contiguous().view(torch.uint8).numpy().data).digest()[:KEY]


def text_key(row: Tensor, padding: int) -> bytes:
    """Hash token ids (L,) without the padding at their end."""
    ids = row.numpy()
    length = int(np.flatnonzero(ids != padding).max(initial=-1)) + 1
    return hashlib.blake2b(ids[:length].tobytes(), digest_size=KEY).digest()


def tower_digest(model: DualEncoder, tower: str) -> str:
    """Hash a tower's weights except the projection, its recipe section, and the versions of the code."""
    # Equal weights may compute other features: with another pooling, activation or number of heads, or in other code.
    section = model.recipe.image if tower == IMAGE else model.recipe.text
    versions = FEATURE_VERSION, torch.__version__, timm.__version__, PIL.__version__  # Pillow decodes and resizes
    known = [section.model_dump(mode="json"), versions]
    digest = hashlib.sha256(json.dumps(known).encode())
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(tower)}
    hash_tensors(digest, {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTIONS)})
    return digest.hexdigest()[:24]


class Features(NamedTuple):
    """Pooled features of all pairs that can be used, with what the out-of-fold table says of them."""

    pairs: Pairs
    groups: np.ndarray  # (n,), see `choose_heads`
    indices: np.ndarray  # (m,) of the pair of each caption in the source
    captions: list[str]  # (m,)
    skipped: SkipCounter


def compute_features(encoder: FrozenEncoder, source: PairSource, recipe: Recipe, shown: bool) -> Features:
    """Compute the pooled features of all images and distinct captions, and the groups that stay in one fold."""
    # --- one pass over the images, for features and for the hashes that the groups are made of
    batches = np.split(np.arange(len(source)), range(BATCH, len(source), BATCH))
    workers = usual_workers() if len(source) > MANY else 0
    images, pairs, skipped = list[Tensor](), list[tuple[PairRow, tuple[str, ...]]](), SkipCounter()
    read_pair = partial(_read_pair, encoder.preprocessor)
    stream = encode_batches(encoder, source, read_pair, batches, workers, shown, encoder.pool_fitted)
    for features, read, broken in stream:
        images += [features] if read else []
        pairs += read
        skipped.merge(broken)
    rows = ReadPairs.of((row for row, _ in pairs), skipped)
    groups = related_pairs(rows, source)
    skipped.refuse(len(source), recipe.data.max_broken_fraction, source.name)
    # --- captions
    captions = [caption for _, own in pairs for caption in own]
    owners = np.repeat(np.arange(len(pairs)), [len(own) for _, own in pairs])
    texts = encoder.pool_captions(captions, shown)
    together = Pairs(torch.cat(images), texts, torch.from_numpy(owners))
    return Features(together, groups, rows.pairs["index"][owners], captions, skipped)


def _read_pair(
    preprocess: Preprocess, source: PairSource, index: int
) -> tuple[Tensor, tuple[PairRow, tuple[str, ...]]]:
    """Read a pair and resize its image as for a search, which takes a tenth of the time for 12 megapixels."""
    lazy = source.read_lazy(index)
    pixels = lazy.image.reduced(preprocess.enough)
    pair = Pair(lazy.key, Image.fromarray(pixels), lazy.captions)
    return preprocess.resized(pixels), (row_of(pair, index, hashed=True), pair.captions)


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


def projections(model: DualEncoder) -> tuple[nn.Linear | PosteriorProjection, nn.Linear]:
    """The projections of images and of texts into the shared space."""
    return model.image_tower.proj, cast(nn.Linear, model.text_tower.text_projection)


@torch.no_grad()
def embeddings(pairs: Pairs, model: DualEncoder) -> Pairs:
    """Pooled features as embeddings of unit length in the space of the model's projections."""
    image, text = projections(model)
    device = image.weight.device
    sides = [(image, pairs.images), (text, pairs.texts)]
    images, texts = (normalize(side(rows.to(device)).float(), dim=-1).cpu() for side, rows in sides)
    return Pairs(images, texts, pairs.owners)
