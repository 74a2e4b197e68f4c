import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import declip
from conftest import draw
from declip.data.sources.open import open_source
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.reports.sheets import search_sheet
from declip.search.index import Index
from declip.search.manifest import MANIFEST
from indices import tiny_model, write_index, write_pairs


@pytest.fixture
def made(model: DualEncoder, folder: Path, tmp_path: Path) -> Index:
    return declip.embed(model, folder, out=tmp_path / "index", dtype="float32")


def brute(index: Index, query: np.ndarray) -> list[tuple[int, float]]:
    scores = index.vectors(index.ids).numpy().astype(np.float64) @ query.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    return [(int(index.ids[at]), float(scores[at])) for at in order]


def test_search_by_text_image_and_both(made: Index, model: DualEncoder, folder: Path) -> None:
    query_image = Image.open(folder / "red-bar.png").convert("RGB")
    with torch.no_grad():
        text = model.encode_text(model.tokenize(["a red bar"]))[0].double().numpy()
        image = model.encode_image(model.preprocess([query_image]))[0].double().numpy()
    both = 0.7 * text + 0.3 * image
    for hits, query in (
        (made.search("a red bar", k=5), text),
        (made.search(image=folder / "red-bar.png", k=5), image),
        (made.search("a red bar", query_image, weights=(0.7, 0.3), k=5), both / np.linalg.norm(both)),
    ):
        expected = brute(made, query)[:5]
        assert [hit.id for hit in hits] == [id_ for id_, _ in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], atol=1e-5)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side, as a phone writes it
    exif_file = folder.parent / "turned.png"
    query_image.save(exif_file, exif=exif)
    torch.testing.assert_close(made.query(image=Image.open(exif_file)), made.query(image=exif_file))
    [itself, *others] = made.search(image=query_image, k=4)
    assert itself.key == "red-bar.png"
    assert [hit.id for hit in made.neighbors(itself.id, 3)] == [hit.id for hit in others]
    assert len(made.neighbors(itself.id, 100)) == 23
    with torch.no_grad():
        drawing = model.encode_text(model.tokenize(["a drawing of a bar"]))[0]
    torch.testing.assert_close(made.query("bar", template="a drawing of a {}"), drawing)
    assert made.query("bar", template="emoji").norm().item() == pytest.approx(1, abs=1e-5), "a mean"


def test_images_are_found_by_key_and_no_path_in_the_index_is_opened(
    made: Index, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no image with the id"):
        made.image(24)
    row, before = made.row(10), made.image(10)
    Image.new("RGB", (8, 8)).save(folder / "a-first.png")
    assert np.array_equal(Index.open(made.folder, source=folder).image(10), before), "places have moved"
    (folder / row.key).rename(tmp_path / "secret.png")
    moved = Index.open(made.folder)
    for forged in (row, replace(row, key="../secret.png", origin=row.origin._replace(path=f"{tmp_path}/secret.png"))):
        monkeypatch.setattr(moved, "row", lambda id, forged=forged: forged)
        with pytest.raises(UserError, match="is no longer in 'shapes'"):
            moved.image(10)


def test_another_model_is_refused(made: Index, model: DualEncoder) -> None:
    other = tiny_model()
    other.preprocessor.mean = torch.zeros(3)
    text = model.recipe.text.model_copy(update={"activation": "gelu"})
    computed = DualEncoder.from_recipe(model.recipe.model_copy(update={"text": text}))
    computed.load_state_dict(model.state_dict())
    for wrong in (tiny_model(1), other, computed.eval()):
        with pytest.raises(UserError, match="another model"):
            Index.open(made.folder, model=wrong).search("a red bar")
    with pytest.raises(UserError, match="a Python object"):
        Index.open(made.folder).search("a red bar")
    assert Index.open(made.folder, model=model).search("a red bar", k=1)


def test_a_bad_query_says_why(made: Index) -> None:
    image = Image.new("RGB", (8, 8))
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"text": "  "}, "nothing to search for"),
        ({"text": "a", "k": 0}, "k is 0"),
        ({"text": "a", "image": "nowhere.png"}, "missing image"),
        ({"text": "a", "over": "words"}, "'words'"),
        ({"text": "a", "over": "captions"}, "no vectors of captions"),
        ({"text": "a", "template": "no braces"}, "no braces"),
        ({"text": "a", "image": image, "weights": (0.0, 0.0)}, "nothing is left"),
        ({"text": "a", "image": image, "weights": (float("nan"), 1.0)}, "two numbers"),
    )
    for arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            made.search(**arguments)


def test_damage_is_said(made: Index) -> None:
    part, manifest = made.folder / "part-000000.arrow", made.folder / MANIFEST
    content, text = part.read_bytes(), manifest.read_bytes()
    half, tree = len(content) // 2, json.loads(text)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"layout": 99}, "another version of declip: layout"),
        ({"parts": [{**tree["parts"][0], "file": "../../secret.arrow"}]}, "parts.0.file"),
        ({"next_id": 3}, "do not follow"),
        ({"dimension": 8}, "other rows"),
    )
    damages = [
        (part, content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :], "part-000000.arrow' .* checksum"),
        (part, content[:-10], "part-000000.arrow' .*bytes instead of"),
        *((manifest, json.dumps({**tree, **change}).encode(), message) for change, message in changes),
        *((manifest, broken, MANIFEST) for broken in (b"", b"[]", b'{"layout": 1}', text[:100])),
    ]
    for path, damaged, message in damages:
        whole = path.read_bytes()
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            Index.open(made.folder)
        path.write_bytes(whole)
    part.unlink()
    with pytest.raises(UserError, match=r"part-000000.arrow' is damaged"):
        Index.open(made.folder)
    with pytest.raises(UserError, match="no index"):
        Index.open(made.folder.parent)


def test_a_source_that_is_an_object_has_to_be_given_again(model: DualEncoder, table: Path, tmp_path: Path) -> None:
    source = open_source(table)
    made = declip.embed(model, source, out=tmp_path / "index")
    assert made.image(0).size == (40, 40)
    with pytest.raises(UserError, match="open the index with source="):
        Index.open(tmp_path / "index").image(0)
    photos = [(draw("red", "bar"), "a red bar"), (draw("blue", "circle"), "a blue circle")]
    declip.embed(model, photos, out=tmp_path / "photos")
    assert Index.open(tmp_path / "photos", source=photos).image(1).tobytes() == photos[1][0].tobytes()
    with pytest.raises(UserError, match="not finite"):
        made.nearest(np.full((1, made.manifest.dimension), np.nan), 3)


def test_the_sheet_shows_what_was_found(made: Index, folder: Path) -> None:
    hits = made.search(image=folder / "red-bar.png", k=9)
    (folder / hits[1].key).unlink()
    drawn = search_sheet(Index.open(made.folder), hits, "like red-bar.png", Image.new("RGB", (50, 50), "lime"))
    pixels = np.asarray(drawn).reshape(-1, 3)
    assert (pixels == (0, 255, 0)).all(1).sum() > 1000, "what was asked with"
    assert (pixels == (255, 0, 0)).all(1).sum() > 500, "what was found"


def test_both_exports_hold_the_vectors_in_their_order(tmp_path: Path, command: Any) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    folder = write_index(tmp_path / "index", vectors)
    (tmp_path / "x.csv").write_text("the pairs")
    for name in ("x.npy", "x.parquet"):
        assert command("index", "export", folder, tmp_path / name).status == 0
    index = Index.open(folder)
    loaded, table = np.load(tmp_path / "x.npy"), pq.read_table(tmp_path / "x.parquet")
    assert (loaded.dtype, loaded.shape) == (np.float32, (1200, 8))
    assert np.array_equal(loaded, vectors.numpy())
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors.numpy())
    assert table["key"].to_pylist() == index.keys()
    assert (tmp_path / "x.csv").read_text() == "the pairs"
    rows = csv.DictReader((tmp_path / "x.npy.csv").open())
    assert [(int(row["id"]), row["key"]) for row in rows] == list(zip(index.ids.tolist(), index.keys(), strict=True))
    assert torch.equal(index.vectors(int(index.ids[3])), vectors[3:4])
    assert ".parquet" in command("index", "export", folder, tmp_path / "x.txt").err
    with pytest.raises(UserError, match="'words'"):
        index.export(tmp_path / "y.npy", over="words")  # type: ignore[arg-type]


def test_vectors_of_captions_and_of_16_bits_are_exported(tmp_path: Path, model: DualEncoder, folder: Path) -> None:
    images, texts = torch.eye(3), torch.eye(3).flip(0)
    index = write_pairs(tmp_path / "index", images, texts, ["a", "", "c"])
    assert np.array_equal(np.load(index.export(tmp_path / "x.npy", over="captions")), texts.numpy())
    with pytest.raises(UserError, match="--captions"):
        Index.open(write_index(tmp_path / "plain", images)).export(tmp_path / "y.npy", over="captions")
    half = declip.embed(model, folder, out=tmp_path / "half")
    loaded = np.load(half.export(tmp_path / "half.npy"))
    assert loaded.dtype == np.float16
    assert np.array_equal(loaded.astype(np.float32), half.vectors(half.ids).numpy())
    assert pq.read_table(half.export(tmp_path / "half.parquet"))["vector"].type.value_type == "float"
