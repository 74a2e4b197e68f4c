"""A tiny model with random weights, a folder of pictures without captions, and indices of made-up vectors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from conftest import COLOURS, SHAPES, TINY, WEIGHTS, draw
from declip.config import Recipe
from declip.data.origin import Origin
from declip.explore.manifest import Manifest, ModelOf, Source
from declip.explore.parts import Row, batch_of, write_part
from declip.models.dual_encoder import DualEncoder


def tiny_model(seed: int = 0) -> DualEncoder:
    """A model of a few thousand random weights."""
    torch.manual_seed(seed)
    recipe = Recipe.model_validate({**TINY, "data": {"source": "unused"}, "weights": WEIGHTS["clip"]})
    return DualEncoder.from_recipe(recipe).eval()


def write_index(folder: Path, vectors: Tensor, part_rows: int = 500) -> Path:
    """An index of vectors that no model made, in float32."""
    manifest = Manifest(
        model=ModelOf(spec="", fingerprint="0" * 64, precision="fp32"),
        source=Source(spec="", name="made up"),
        dtype="float32",
        captions=False,
        dimension=vectors.shape[1],
    )
    folder.mkdir(parents=True)
    append_vectors(folder, manifest, vectors, part_rows)
    return folder


def append_vectors(folder: Path, manifest: Manifest, vectors: Tensor, part_rows: int = 500) -> None:
    """Add rows to an index."""
    for part in vectors.split(part_rows):
        ids = range(manifest.next_id, manifest.next_id + len(part))
        rows = [Row(id_, f"key {id_}", (f"caption {id_}",), id_, Origin()) for id_ in ids]
        batch = batch_of(manifest, rows, part, None)
        manifest.parts = [*manifest.parts, write_part(folder, len(manifest.parts), batch)]
        manifest.next_id = ids.stop
    manifest.save(folder)


def clustered(rows: int, width: int, generator: torch.Generator, seed: int = 0) -> Tensor:
    """(rows, width) of length 1, around a hundred centres that the seed draws."""
    centres = torch.randn(100, width, generator=torch.Generator().manual_seed(seed))
    chosen = torch.randint(100, (rows,), generator=generator)
    return normalize(centres[chosen] + 0.7 * torch.randn(rows, width, generator=generator), dim=-1)


@pytest.fixture(scope="session")
def model() -> DualEncoder:
    """The model that makes the indices."""
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures of shapes, without captions."""
    path = tmp_path / "shapes"
    path.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(path / f"{colour}-{shape}.png")
    return path
