"""A tiny model with random weights, a folder of images without captions, and indices of made-up vectors."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import COLOURS, SHAPES, TINY, WEIGHTS, draw
from declip.data.pair import Origin
from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.search.index import Index
from declip.search.manifest import Manifest, ModelEntry, SourceEntry
from declip.search.store import IndexedImage, batch_of, write_part


def tiny_model(seed: int = 0) -> DualEncoder:
    """A model of a few thousand random weights."""
    torch.manual_seed(seed)
    recipe = Recipe.model_validate({**TINY, "data": {"source": "unused"}, "loss_weights": WEIGHTS["clip"]})
    return DualEncoder.from_recipe(recipe).eval()


def made_up_manifest(dimension: int, captions: bool = False) -> Manifest:
    """Manifest of an index of vectors that no model made, in float32."""
    made_by = ModelEntry(spec="", fingerprint="0" * 64)
    source = SourceEntry(spec="", name="made up")
    return Manifest(model=made_by, source=source, dtype="float32", captions=captions, dimension=dimension)


def append(folder: Path, manifest: Manifest, images: Tensor, texts: Tensor | None, captions: Sequence[str]) -> None:
    """Add a part of rows to an index; an empty caption stands for none."""
    rows = [
        IndexedImage(id, f"key {id}", (caption,) if caption else (), id, Origin())
        for id, caption in enumerate(captions, manifest.next_id)
    ]
    part = write_part(folder, manifest.next_part, batch_of(manifest, rows, images, texts))
    manifest.parts, manifest.next_id = [*manifest.parts, part], manifest.next_id + len(rows)
    manifest.save(folder)


def write_index(folder: Path, vectors: Tensor) -> Path:
    """An index of vectors that no model made, of images alone, in parts."""
    folder.mkdir()
    manifest = made_up_manifest(vectors.shape[1])
    for part in vectors.split(500):
        append(folder, manifest, part, None, [f"caption {manifest.next_id + n}" for n in range(len(part))])
    return folder


def write_pairs(folder: Path, images: Tensor, texts: Tensor, captions: Sequence[str]) -> Index:
    """An index of made-up vectors of images and captions."""
    folder.mkdir()
    append(folder, made_up_manifest(images.shape[1], captions=True), images, texts, captions)
    return Index.open(folder)


@pytest.fixture(scope="session")
def model() -> DualEncoder:
    """The model that makes the indices."""
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 images of shapes, without captions."""
    path = tmp_path / "shapes"
    path.mkdir()
    for color in COLOURS:
        for shape in SHAPES:
            draw(color, shape).save(path / f"{color}-{shape}.png")
    return path


@pytest.fixture(scope="session")
def weights_file(model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a file."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_declip_file(model, path)
    return path
