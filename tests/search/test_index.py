"""The index: exact search against a loop, queries, damage, and other programs that read it."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import declip
from conftest import draw, refuses
from declip.data.pair import Origin, Pair, PairSource
from declip.data.sources.open import open_source
from declip.io.outputs import INDEX_FILE
from declip.models.dual_encoder import DualEncoder, PublishedHeads
from declip.models.fingerprint import fingerprint
from declip.reports.sheets import search_sheet
from declip.search.index import Index, nearest
from declip.search.info import IndexInfo, ModelInfo, SourceInfo
from declip.search.store import SCHEMA, Block, IndexedImage
from declip.search.writer import new_index
from indices import tiny_model, write_index


@pytest.fixture
def made(embed, folder):
    return embed(folder, dtype="float32")


def brute(index, query):
    scores = index.vectors(index.ids).numpy().astype(np.float64) @ query.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    return [(int(index.ids[at]), float(scores[at])) for at in order]


def test_search_by_text_image_and_both(made, model, folder):
    query_image = Image.open(folder / "red-bar.png").convert("RGB")
    with torch.no_grad():
        text = model.encode_text(model.tokenize(["a red bar"]))[0].double().numpy()
        image = model.encode_image(model.preprocess([query_image]))[0].double().numpy()
    both = 0.7 * text + 0.3 * image
    both /= np.linalg.norm(both)
    for asked, query in (
        ({"text": "a red bar"}, text),
        ({"image": folder / "red-bar.png"}, image),
        ({"text": query_image}, image),
        ({"text": "a red bar", "image": query_image, "weights": (0.7, 0.3)}, both),
    ):
        hits = made.search(**asked, k=5, copies=True)
        expected = brute(made, query)[:5]
        assert [hit.id for hit in hits] == [id for id, _ in expected]
        scores = [score for _, score in expected]
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-5)
    found = made.search(image=query_image, k=4, copies=True)
    assert found[0].key == "red-bar.png"
    assert made.nearest(made.vectors([found[0].id]).double(), 4)[0][0].tolist() == [
        hit.id for hit in found
    ]
    torch.testing.assert_close(
        made.query("bar", template="a red {}"), torch.from_numpy(text).float()
    )
    assert made.query("bar", template="emoji").norm().item() == pytest.approx(1, abs=1e-5), "a mean"


def test_images_are_found_by_key_and_no_path_in_the_index_is_opened(
    made, folder, tmp_path, monkeypatch
):
    refuses("no image with the id", made.image, 24)
    row = made.row(10)
    before = made.image(10)
    Image.new("RGB", (8, 8)).save(folder / "a-first.png")
    assert np.array_equal(Index.open(made.folder, source=folder).image(10), before), (
        "places have moved"
    )
    (folder / row.key).rename(tmp_path / "secret.png")
    moved = Index.open(made.folder)
    secret = row.origin._replace(path=f"{tmp_path}/secret.png")
    for forged in (row, replace(row, key="../secret.png", origin=secret)):
        monkeypatch.setattr(moved, "row", lambda id, forged=forged: forged)
        refuses("is no longer in 'shapes'", moved.image, 10)


def test_a_search_over_captions_finds_only_images_with_captions(tmp_path):
    images = torch.eye(4, 3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.8, 0.6, 0], [0, 0, 0]])  # zeros: no caption
    index = write_index(tmp_path / "index", images, texts, ["one", "", "two", ""])
    far = torch.tensor([[-1.0, 0, 0]])  # all cosines are negative, less than those of zeros
    assert index.nearest(far, 4, over="captions")[0].tolist() == [[2, 0]]


class Copies(PairSource):
    """Images of one key, whose red is their number."""

    name = "copies"

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Pair.of("red-bar.png", Image.new("RGB", (4, 4), (index, 0, 0)), ("a bar",))


def test_of_several_images_with_the_key_the_first_is_read(made):
    hits = made.search("red", k=24, copies=True)
    hit = next(hit for hit in hits if hit.key == "red-bar.png")
    assert hit.index > 2
    assert Index.open(made.folder, source=Copies()).image(hit.id).getpixel((0, 0)) == (0, 0, 0)


def test_another_model_is_refused(made, model):
    other = tiny_model()
    other.preprocessor.mean = torch.zeros(3)
    text = model.recipe.text.model_copy(update={"activation": "gelu"})
    computed = DualEncoder(model.recipe.model_copy(update={"text": text}))
    computed.load_state_dict(model.state_dict())
    for wrong in (tiny_model(1), other, computed.eval()):
        refuses("another model", Index.open(made.folder, model=wrong).search, "a red bar")
        said = r"the model was '.*' \(fingerprint \w{8}\), now "
        refuses(said, declip.embed, wrong, made.info.source.path, out=made.folder)
    refuses("a Python object", Index.open(made.folder).search, "a red bar")
    assert Index.open(made.folder, model=model).search("a red bar", k=1)


def test_projections_that_are_computed_on_another_machine_are_the_same_model():
    one, other = tiny_model(), tiny_model()
    other.image_tower.proj.weight.data *= 1 + 1e-6
    name = "image_tower.proj.weight"
    for model in (one, other):
        heads = {name: model.state_dict()[name].clone()}
        model.published = PublishedHeads("digests of published files", heads)
    assert fingerprint(one) == fingerprint(other)
    other.image_tower.proj.weight.data *= 1 + 1e-6  # trained since
    assert fingerprint(one) != fingerprint(other)
    before = fingerprint(one)
    one.published = replace(one.published, files="digests of other files")
    assert fingerprint(one) != before


def test_a_bad_query_says_why(made):
    image = Image.new("RGB", (8, 8))
    wrong = (
        ({"text": "  "}, "Nothing to search for"),
        ({"text": ["red", "blue"]}, "one text.*list"),
        ({"text": "a", "k": 0}, "k is 0"),
        ({"text": "a", "image": "nowhere.png"}, r"missing image: nowhere.png \(No such [^']*\)"),
        ({"text": "a", "over": "words"}, "'words'"),
        ({"text": "a", "over": "captions"}, "no vectors of captions"),
        ({"text": "a", "template": "no braces"}, "no braces"),
        ({"text": "a", "image": image, "weights": (0.0, 0.0)}, "nothing is left"),
        ({"text": "a", "image": image, "weights": (float("nan"), 1.0)}, "two numbers"),
    )
    for arguments, message in wrong:
        refuses(message, made.search, **arguments)


def test_damage_is_said(made, embed, folder):
    path, files = made.folder / INDEX_FILE, made.folder
    tree = json.loads(path.read_text())
    npy, rows = (files / "vectors.npy").read_bytes(), (files / "rows.parquet").read_bytes()
    shorter = npy.replace(b"(24, 16)", b"(16, 24)")
    changes = (
        ({"layout": 99}, r"index\.json.* newer version"),
        ({"rows": "x"}, "rows"),
        ({"dimension": 8}, "vectors.npy has shape"),
        ({"captions": True}, "caption_vectors.npy"),
    )
    damages = [
        (files / "vectors.npy", npy[:-10], "damaged: .*file size"),
        (files / "vectors.npy", shorter, "shape"),
        (files / "vectors.npy", b"\x80" * len(npy), "damaged"),
        (files / "rows.parquet", b"PAR1" * (len(rows) // 4) + rows[: len(rows) % 4], "damaged"),
        (files / "rows.parquet", rows.replace(b"black-bar.png", b"\xff" * 13), "damaged"),
        *((path, json.dumps({**tree, **change}).encode(), message) for change, message in changes),
        *(
            (path, broken, INDEX_FILE)
            for broken in (b"", b"[]", b'{"layout": 1}', path.read_bytes()[:100])
        ),
    ]
    for file, damaged, message in damages:
        whole = file.read_bytes()
        file.write_bytes(damaged)
        refuses(message, lambda: Index.open(made.folder).row(0))
        file.write_bytes(whole)
    (files / "vectors.npy").unlink()
    refuses("is missing", Index.open, made.folder)
    assert len(embed(folder, dtype="float32")) == 24
    refuses("not a complete index", Index.open, made.folder.parent)


def test_a_table_that_expands_is_refused(made):
    rows, path = 24, made.folder / "rows.parquet"
    keys = pa.array(["x" * 500_000] * rows, pa.large_string())
    table = pq.read_table(path).set_column(1, SCHEMA.field("key"), keys)
    for dictionary, compression in ((["key"], "NONE"), (False, "ZSTD")):
        pq.write_table(table, path, use_dictionary=dictionary, compression=compression)
        assert path.stat().st_size < 1_000_000
        refuses("not written by declip", Index.open, made.folder)


def test_a_source_that_is_an_object_has_to_be_given_again(embed, table, tmp_path):
    source = open_source(table)
    made = embed(source)
    assert made.image(0).size == (40, 40)
    refuses("open the index with source=", Index.open(tmp_path / "index").image, 0)
    photos = [(draw("red", "bar"), "a red bar"), (draw("blue", "circle"), "a blue circle")]
    embed(photos, "photos")
    image = Index.open(tmp_path / "photos", source=photos).image(1)
    assert image.tobytes() == photos[1][0].tobytes()
    refuses("NaN", made.nearest, np.full((1, made.info.dimension), np.nan), 3)


def test_the_sheet_shows_what_was_found(made, folder):
    hits = made.search(image=folder / "red-bar.png", k=9, copies=True)
    lime = Image.new("RGB", (50, 50), "lime")
    drawn = search_sheet(Index.open(made.folder), hits, "like red-bar.png", lime)
    pixels = np.asarray(drawn).reshape(-1, 3)
    assert (pixels == (0, 255, 0)).all(1).sum() > 1000, "what was asked with"
    assert (pixels == (255, 0, 0)).all(1).sum() > 500, "what was found"


def test_a_sheet_of_images_that_are_gone_is_an_error(weights_file, folder, command, tmp_path):
    made = declip.embed(weights_file, folder, out=tmp_path / "index")
    query, sheet = draw_to(tmp_path / "query.png"), tmp_path / "sheet.png"
    search = ("search", made.folder, "--image", query, "-k", 2, "--copies")
    first = command(*search).out
    second = made.search(image=query, k=2, copies=True)[1].key
    (folder / second).unlink()
    told = [f"'{second}'", "declip embed"]
    assert command.refused(told, *search, "--contact-sheet", sheet).out == first
    folder.rename(tmp_path / "moved")
    command.refused(["--source"], *search, "--contact-sheet", sheet)
    assert not sheet.exists()


def draw_to(path):
    Image.new("RGB", (50, 50), "lime").save(path)
    return path


def test_the_summary_of_an_open_index_outlives_an_update(made, embed, folder):
    before = made.summary()
    draw_to(folder / "new.png")
    embed(folder, dtype="float32")
    assert len(Index.open(made.folder)) == len(made) + 1
    assert made.summary() == before


def test_the_files_of_an_index_are_read_by_other_programs(tmp_path):
    images, texts = torch.eye(3), torch.eye(3).flip(0)
    index = write_index(tmp_path / "index", images, texts, ["a", "", "c"])
    captions, rows, vectors = index.summary().rpartition("Files: ")[2].split(", ")
    assert np.array_equal(np.load(vectors), images.numpy())
    assert np.array_equal(np.load(captions), texts.numpy())
    assert pq.read_table(rows)["key"].to_pylist() == index.keys()
    refuses("--captions", write_index(tmp_path / "plain", images).vectors, [0], "captions")
    refuses("'words'", index.vectors, [0], "words")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearest_equals_a_loop_in_float64(dtype, monkeypatch):
    monkeypatch.setattr("declip.search.index.ROWS", 30)
    # 7 rows: blocks do not divide the parts
    monkeypatch.setattr("declip.search.index.BLOCK_BYTES", 4 * 24 * 7)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 24, generator=generator).to(dtype)
    queries = torch.randn(5, 24, generator=generator)
    ids = torch.arange(100) * 3 + 1
    dead = torch.rand(100, generator=generator) < 0.3
    dead[60:90] = True  # a block of which nothing is alive
    vectors[dead] = 0
    found, scores = nearest(queries, ids, vectors, 10, skip_zeros=True)

    products = queries.numpy().astype(np.float64) @ vectors.numpy().astype(np.float64).T
    for row, own in enumerate(products):
        alive = [(-score, int(ids[at])) for at, score in enumerate(own) if not dead[at]]
        best = sorted(alive)[:10]
        assert found[row].tolist() == [id for _, id in best]
        np.testing.assert_allclose(scores[row], [-score for score, _ in best], rtol=1e-5)


def test_few_vectors_give_few_results():
    vectors = torch.tensor([1.0, 0, 1, 1])[:, None].expand(4, 8)
    ids = torch.tensor([2, 5, 7, 9])
    found, _ = nearest(torch.ones(2, 8), ids, vectors, 10, skip_zeros=True)
    assert found.tolist() == [[2, 7, 9]] * 2
    assert nearest(torch.ones(1, 8), torch.arange(0), torch.ones(0, 8), 3)[0].shape == (1, 0)


def test_rows_are_read_in_the_order_of_ids(tmp_path, monkeypatch):
    for module in ("store", "writer"):
        monkeypatch.setattr(f"declip.search.{module}.GROUP_ROWS", 7)
    index = write_index(tmp_path / "index", torch.eye(40))
    ids = [39, 0, 13, 7, 13, 6]
    for id, row in zip(ids, index.rows(ids), strict=True):
        assert (row.id, row.key, row.index) == (id, f"key {id}", id)
        assert row.captions == (f"caption {id}",)
    assert index.rows([]) == []
    refuses("id 40", index.rows, [3, 40])


def test_vectors_are_written_in_order(tmp_path):
    """A map of a sparse file would end the process on a full disk."""
    rows, sizes = [IndexedImage(n, str(n), (), n, Origin()) for n in range(4000)], []
    made_by = ModelInfo(path="", name="no model", fingerprint="0" * 64)
    source = SourceInfo(path="", name="made up")
    info = IndexInfo(model=made_by, source=source, dtype="float32", captions=False)
    with new_index(tmp_path / "made", info) as writer:
        for start in range(0, 4000, 1000):
            vectors = torch.eye(64).repeat(63, 1)[:1000]
            writer.add(Block.of(rows[start : start + 1000], vectors, None, "float32"))
            sizes.append(max(path.stat().st_size for path in tmp_path.rglob("vectors.npy")))
    assert all(size <= 1000 * 64 * 4 * (number + 1) + 128 for number, size in enumerate(sizes)), (
        sizes
    )
    assert np.load(tmp_path / "made" / "vectors.npy").shape == (4000, 64)
