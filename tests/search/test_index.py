import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from declip.data.sources.open import open_source
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.reports.sheets import search_sheet as sheet
from declip.search.index import Index
from declip.search.manifest import MANIFEST
from indices import tiny_model


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
    assert made.search(image=query_image, k=1)[0].key == "red-bar.png"
    with torch.no_grad():
        drawing = model.encode_text(model.tokenize(["a drawing of a bar"]))[0]
    torch.testing.assert_close(made.query("bar", template="a drawing of a {}"), drawing)
    assert made.query("bar", template="emoji").norm().item() == pytest.approx(1, abs=1e-5), "a mean"


def test_neighbors_leave_out_the_image_itself(made: Index) -> None:
    expected = [id_ for id_, _ in brute(made, made.vectors([7])[0].numpy()) if id_ != 7][:3]
    assert [hit.id for hit in made.neighbors(7, 3)] == expected
    assert len(made.neighbors(7, 100)) == 23


def test_removed_images_are_never_found_and_stay_out(made: Index, model: DualEncoder, folder: Path) -> None:
    query = folder / "red-bar.png"
    assert made.remove(["red-bar.png", "red-circle.png"]) == 2
    assert not {"red-bar.png", "red-circle.png"} & {hit.key for hit in made.search(image=query, k=24)}
    assert len(made) == 22
    with pytest.raises(UserError, match="no image with the id"):
        made.image(made.manifest.removed[0])
    again = declip.embed(model, folder, out=made.folder, dtype="float32")
    assert len(again) == 22
    assert again.compact() > 0
    assert [part.rows for part in again.manifest.parts] == [22]
    assert len(declip.embed(model, folder, out=made.folder, dtype="float32")) == 22, "also after a compaction"
    assert again.restore(["red-bar.png"]) == 1
    found = declip.embed(model, folder, out=made.folder, dtype="float32").search(image=query, k=1)
    assert found[0].key == "red-bar.png"


def test_restore_brings_back_at_once_and_compaction_keeps_ids_and_vectors(made: Index) -> None:
    with pytest.raises(UserError, match=r"'redbar.png'"):
        made.remove(["red-bar.png", "redbar.png"])
    assert len(Index.open(made.folder)) == 24, "nothing is removed then"
    made.remove(["black-bar.png", "red-bar.png", "blue-bar.png"])
    assert made.restore(["blue-bar.png", "green-bar.png"]) == 1
    assert len(made) == 22
    ids, vectors = made.ids, made.vectors(made.ids)
    made.compact()
    assert np.array_equal(made.ids, ids)
    assert torch.equal(made.vectors(ids), vectors)
    assert sorted(path.name for path in made.folder.iterdir() if path.suffix == ".arrow") == ["part-000001.arrow"]


def test_images_are_found_by_key_when_places_have_moved(made: Index, folder: Path) -> None:
    row = made.row(10)
    before = made.image(10)
    Image.new("RGB", (8, 8)).save(folder / "a-first.png")
    moved = Index.open(made.folder, source=folder)
    assert np.array_equal(moved.image(10), before)
    (folder / row.key).unlink()
    with pytest.raises(UserError, match="is no longer in 'shapes'"):
        Index.open(made.folder).image(10)


def test_no_path_in_the_index_is_opened(made: Index, folder: Path, tmp_path: Path) -> None:
    """An index that names a file outside its source shows nothing of it."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    row = made.row(0)
    forged = row._replace(key="../secret.png", origin=row.origin._replace(path=str(tmp_path / "secret.png")))
    with pytest.raises(UserError, match="no longer in"):
        made._read(forged)


def test_another_model_is_refused(made: Index, model: DualEncoder) -> None:
    other = tiny_model()
    other.preprocessor.mean = torch.zeros(3)
    for wrong in (tiny_model(1), other):
        with pytest.raises(UserError, match="another model"):
            Index.open(made.folder, model=wrong).search("a red bar")
    with pytest.raises(UserError, match="a Python object"):
        Index.open(made.folder).search("a red bar")
    assert Index.open(made.folder, model=model).search("a red bar", k=1)


def test_a_bad_query_says_why(made: Index) -> None:
    image = Image.new("RGB", (8, 8))
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"text": "  "}, "is empty"),
        ({}, "nothing to search for"),
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
    content, text = part.read_bytes(), manifest.read_text()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged, message in ((flipped, "checksum"), (content[:-10], "bytes instead of")):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match=f"part-000000.arrow' .*{message}"):
            Index.open(made.folder)
    part.unlink()
    with pytest.raises(UserError, match=r"part-000000.arrow' is damaged"):
        Index.open(made.folder)
    part.write_bytes(content)
    tree = json.loads(text)
    changes: tuple[tuple[dict, str], ...] = (
        ({"layout": 99, "declip": "9.0"}, "declip 9.0 in layout 99"),
        ({"layout": 0, "declip": "0.0"}, "declip 0.0 in layout 0"),
        ({"parts": [{**tree["parts"][0], "file": "../../secret.arrow"}]}, "parts.0.file"),
        ({"next_id": 3}, "do not follow"),
        ({"dimension": 8}, "other rows"),
    )
    damages = [(json.dumps({**tree, **change}), message) for change, message in changes]
    for damaged, message in [*damages, *((broken, MANIFEST) for broken in ("", "[]", '{"layout": 1}', text[:100]))]:
        manifest.write_text(damaged)
        with pytest.raises(UserError, match=message):
            Index.open(made.folder)
    with pytest.raises(UserError, match="no index"):
        Index.open(made.folder.parent)


def test_an_unfinished_index_is_searched_and_says_so(
    made: Index, model: DualEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    assert made.manifest.update is not None
    made.manifest.update.finished = False
    made.manifest.save(made.folder)
    with caplog.at_level(logging.WARNING, "declip"):
        assert len(Index.open(made.folder, model=model).search("bar")) == 10
    assert "unfinished: 24 of 24 images" in caplog.text


def test_a_source_that_is_an_object_has_to_be_given_again(model: DualEncoder, table: Path, tmp_path: Path) -> None:
    source = open_source(table)
    made = declip.embed(model, source, out=tmp_path / "index")
    assert made.image(0).size == (40, 40)
    with pytest.raises(UserError, match="open the index with source="):
        Index.open(tmp_path / "index").image(0)


def test_the_sheet_shows_what_was_found(made: Index, folder: Path) -> None:
    hits = made.search(image=folder / "red-bar.png", k=9)
    (folder / hits[1].key).unlink()
    drawn = sheet(Index.open(made.folder), hits, "like red-bar.png", Image.new("RGB", (50, 50), "lime"))
    pixels = np.asarray(drawn).reshape(-1, 3)
    assert (pixels == (0, 255, 0)).all(1).sum() > 1000, "what was asked with"
    assert (pixels == (255, 0, 0)).all(1).sum() > 500, "what was found"
    one_row = sheet(made, hits[:8], "like red-bar.png")
    assert drawn.height > one_row.height
