"""A tiny model with random weights, a folder of pictures without captions, and indices of made-up vectors."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import declip
from conftest import COLOURS, SHAPES, TINY, WEIGHTS, draw
from declip.data.sources.origin import Origin
from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.search.manifest import Manifest, ModelOf, Source
from declip.search.parts import Row, batch_of, write_part

PAGE = "http://127.0.0.1:8765"


def tiny_model(seed: int = 0) -> DualEncoder:
    """A model of a few thousand random weights."""
    torch.manual_seed(seed)
    recipe = Recipe.model_validate({**TINY, "data": {"source": "unused"}, "loss_weights": WEIGHTS["clip"]})
    return DualEncoder.from_recipe(recipe).eval()


def made_up_manifest(dimension: int, captions: bool = False) -> Manifest:
    """Of an index of vectors that no model made, in float32."""
    return Manifest(
        model=ModelOf(spec="", fingerprint="0" * 64, precision="fp32"),
        source=Source(spec="", name="made up"),
        dtype="float32",
        captions=captions,
        dimension=dimension,
    )


def write_index(folder: Path, vectors: Tensor, part_rows: int = 500) -> Path:
    """An index of vectors that no model made, in float32."""
    manifest = made_up_manifest(vectors.shape[1])
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
    """(rows, width) of length 1, around a hundred centers that the seed draws."""
    centers = torch.randn(100, width, generator=torch.Generator().manual_seed(seed))
    chosen = torch.randint(100, (rows,), generator=generator)
    return normalize(centers[chosen] + 0.7 * torch.randn(rows, width, generator=generator), dim=-1)


@pytest.fixture(scope="session")
def model() -> DualEncoder:
    """The model that makes the indices."""
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures of shapes, without captions."""
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


@pytest.fixture(scope="session")
def run_folder(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with a queue."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tree = {**TINY, "name": "tiny", "data": {"source": str(table)}, "loss_weights": WEIGHTS["declip"]}
    declip.train(Recipe.model_validate(tree), out=folder, quiet=True, report=False)
    return folder


@pytest.fixture(scope="session")
def gallery(run_folder: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the page shows: the pairs of the table, as the run's model sees them."""
    pytest.importorskip("starlette", reason="the page needs declip[app]")
    from declip.app.start import open_gallery

    return open_gallery(str(run_folder), str(table), tmp_path_factory.mktemp("page") / "index")


@pytest.fixture
def client(gallery: Any) -> Iterator[Any]:
    """Asks the page's server as the page itself does; no network is used."""
    testclient = pytest.importorskip("starlette.testclient", reason="the page needs declip[app]")
    from declip.app.web import build

    gallery.jobs = type(gallery.jobs)()
    with testclient.TestClient(build(gallery, "127.0.0.1"), base_url=PAGE, headers={"Origin": PAGE}) as asked:
        yield asked


def finished(client: Any, address: str) -> dict[str, Any]:
    """The answer of an address once its work is done."""
    for _ in range(2_000):
        tree = client.get(address).json()
        if tree["state"] != "working":
            return tree
        time.sleep(0.01)
    raise AssertionError(f"{address} is never done")
