"""Choosing images to caption, the commands of search, and what they import."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import declip
from conftest import read_table, refuses, write_rows
from declip.data.sources.header import warn_once
from declip.data.sources.open import open_source
from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from declip.search import choose as choosing
from declip.search.choose import ALIKE, facility_location
from declip.search.index import Index
from indices import tiny_model
from text_encoders import bert


def clusters(count=300, width=8, seed=0):
    """Vectors of length 1 in clusters of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(12, width, generator=generator)
    owners = (torch.rand(count, generator=generator).square() * 12).long()
    return normalize(
        centers[owners] + 0.6 * torch.randn(count, width, generator=generator) + 1.0, dim=1
    )


def plain_loop(vectors, known, count):
    mean = vectors.mean(0)
    units = normalize(vectors - mean, dim=1)
    similarity = lambda rows: (units @ rows.T).clamp(min=0) ** 3  # noqa: E731
    covered = (
        similarity(normalize(known - mean, dim=1)).amax(1)
        if len(known)
        else torch.zeros(len(units))
    )
    taken, all_known = [], normalize(known - mean, dim=1)
    for _ in range(count):
        gains = (similarity(units) - covered[:, None]).clamp(min=0).sum(0)
        for row in range(len(units)):
            if len(all_known) and (all_known @ units[row]).max() >= ALIKE:
                gains[row] = -1
        taken.append(int(gains.argmax()))
        all_known = torch.cat([all_known, units[taken[-1:]]])
        covered = torch.maximum(covered, similarity(units[taken[-1:]])[:, 0])
    return taken


@pytest.mark.parametrize("known", [0, 9])
def test_the_order_is_that_of_the_plain_loop(known):
    vectors = clusters()
    given = clusters(40, seed=1)[:known]
    found = list(facility_location(vectors, given, 25))
    assert [row for row, _ in found] == plain_loop(vectors, given, 25)
    coverage = [value for _, value in found]
    assert coverage == sorted(coverage)


def test_every_beginning_is_a_choice_and_near_duplicates_come_once():
    vectors = clusters(120)
    doubled = torch.cat([vectors, normalize(vectors + 0.01 * clusters(120, seed=2), dim=1)])
    rows = [row for row, _ in facility_location(doubled, torch.empty(0, 8), 500)]
    assert [row for row, _ in facility_location(doubled, torch.empty(0, 8), 30)] == rows[:30]
    assert len(rows) <= 120
    units = normalize(doubled - doubled.mean(0), dim=1)[rows]
    products = units @ units.T
    assert products.fill_diagonal_(0).max() < ALIKE


def test_pairs_that_are_there_count_as_chosen(embed, model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the index of have.csv is written below it
    (folder / "broken.png").write_bytes(b"no image")
    embed(folder)  # without vectors of captions
    first = declip.choose(model, folder, 24, index=tmp_path / "index")
    assert first.skipped.counts == {"unreadable image": 1}
    # Half of them get captions, in a table that names some without one.
    captioned = [hit.key for hit in first.images[:6]]
    rows = [[folder / name, "a shape"] for name in captioned] + [[folder / first.images[7].key, ""]]
    with (tmp_path / "have.csv").open("w") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    again = declip.choose(model, folder, 24, have=tmp_path / "have.csv", index=tmp_path / "index")
    assert again.known == 6
    assert not {hit.key for hit in again.images} & {*captioned}
    assert [hit.key for hit in again.images[:3]] == [hit.key for hit in first.images[6:9]]
    assert again.images[0].score == pytest.approx(first.images[6].score, abs=1e-3)


def test_the_table_is_one_of_pairs_once_it_has_captions(
    folder, tmp_path, weights_file, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("lists").mkdir()
    (folder / "red-bar.png").rename(folder / "=red.png")
    words = ["choose", weights_file, folder, "--quiet", "--count", 24, "--out"]
    made = command(*words, "lists/first.csv", "--contact-sheet", "sheet.png")
    assert (made.status, "captioned before" in made.out) == (0, True), made.err
    assert Image.open("sheet.png").width > 1000
    rows = read_table(Path("lists/first.csv"))
    keys = [Path(row["image"]).name for row in rows]
    assert keys == [hit.key for hit in declip.choose(weights_file, folder, 24).images]
    assert {row["caption"] for row in rows} == {""}
    coverage = [float(row["coverage"]) for row in rows]
    assert coverage == sorted(coverage)
    captioned = [[row["image"], f"shape {n}"] for n, row in enumerate(rows)]
    with Path("lists/first.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *captioned])
    source = open_source("lists/first.csv")
    captions = [source[n].captions()[0] for n in range(len(source))]
    assert captions == [caption for _, caption in captioned]


def test_columns_of_captions_change_nothing(
    folder, tmp_path, weights_file, command, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()
    rows = [f"{folder}/{name}.png,{name},x" for name in ("red-bar", "blue-bar", "red-circle")]
    Path("pairs.csv").write_text("\n".join(["image,title,description", *rows]))
    Path("plain.csv").write_text("\n".join(["image,color,shape", *rows]))
    words = ["choose", weights_file, "pairs.csv", "--quiet", "--out"]
    for number, more in enumerate(
        ([], ["--caption-column", "description"], ["--caption-column", "none"])
    ):
        assert command(*words, f"{number}.csv", *more).status == 0
    assert (len(list(Path("indices").iterdir())), "Not used" in caplog.text) == (1, False)
    assert len(declip.choose(weights_file, "plain.csv", index="plain").index) == 3
    # An index with captions keeps them, and is not that of other columns.
    declip.embed(weights_file, "pairs.csv", out="index", captions=True)
    assert all(declip.choose(weights_file, "pairs.csv", index="index").index.captions())
    Path("moved.csv").write_text(Path("pairs.csv").read_text().replace("image", "picture"))
    words[2] = "moved.csv"
    assert command(*words, "m.csv", "--image-column", "picture").status == 0


def test_a_large_source_is_sampled(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "MOST", 12)
    one = declip.choose(model, folder, 1, index=tmp_path / "index")
    known = torch.empty(0, one.index.info.dimension)
    same, other = (choosing.choose_from(one.index, 1, known, seed).images[0] for seed in (0, 1))
    assert (one.images[0] == same, one.images[0] == other) == (True, False)
    assert (one.compared, "sample of 12 of 24" in one.summary()) == (12, True)


def test_wrong_input(model, folder, tmp_path):
    refuses("count", declip.choose, model, folder, 0)
    items = [Image.open(folder / "red-bar.png")]
    refuses(
        "keys", declip.choose, model, items, 1, index=tmp_path / "items", out=tmp_path / "x.csv"
    )


def test_embed_search_and_look_after(weights_file, folder, tmp_path, command):
    index, query = tmp_path / "index", folder / "red-bar.png"
    embed = ["embed", weights_file, folder, "--out", index, "--dtype", "float32", "--quiet"]
    made = command(*embed)
    assert (made.status, made.err) == (0, "")
    assert "24 images, 16 numbers each in float32" in made.out

    found, drawn = tmp_path / "found.json", tmp_path / "found.png"
    search = ["search", index, "--image", query, "-k", 3, "--copies"]
    search += ["--json", found, "--contact-sheet", drawn]
    assert command(*search).out.splitlines()[1].split()[1:3] == ["1.000", "red-bar.png"]
    hits = json.loads(found.read_text())["hits"]
    assert (hits[0]["key"], hits[0]["path"], len(hits)) == ("red-bar.png", str(query), 3)
    assert Image.open(drawn).mode == "RGB"
    query.unlink()
    assert "23 images" in command(*embed).out
    assert "23 images" in command("index", "show", index).out


def test_lines_into_a_pipe_are_neither_cut_nor_wrapped(weights_file, folder, tmp_path, command):
    caption, index = " ".join(["a red circle"] * 60), tmp_path / ("a long name " * 10)
    row = {"image": "shapes/red-circle.png", "caption": caption}
    pairs = write_rows(tmp_path / "pairs.jsonl", [row])
    assert command("embed", weights_file, pairs, "--out", index, "--quiet").status == 0
    _, line = command("search", index, "red").out.splitlines()
    assert line.rstrip().endswith(caption)
    assert str(index) in command("index", "show", index).out.splitlines()[0]


def loaded_by(*steps):
    """Which of some modules a program imports up to the end of each step: of code, and names."""
    code = "".join(
        f"{step}\nprint(*(name for name in {names.split()} if name in sys.modules))\n"
        for step, names in steps
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_is_imported_before_it_is_used(folder, tmp_path):
    """The package and its commands import no torch, a text search no library of images."""
    own = tiny_model()
    changes = {"hf_model": str(bert(tmp_path / "bert")), "context_length": 24}
    recipe = own.recipe.model_copy(update={"text": own.recipe.text.model_copy(update=changes)})
    search = "import declip.search.index as i"
    for name, model in (("own", own), ("encoder", DualEncoder(recipe))):
        write_declip_file(model, file := tmp_path / f"{name}.safetensors")
        declip.embed(file, folder, out=tmp_path / name)
        search += f"\ni.Index.open({str(tmp_path / name)!r}).search('red', k=3)"
        # The text tower alone finds what the model finds.
        parts, whole = Index.open(tmp_path / name), Index.open(tmp_path / name, model=file)
        assert whole.model.image_tower.proj is not None
        assert [(hit.key, hit.score) for hit in parts.search("red")] == [
            (h.key, h.score) for h in whole.search("red")
        ]
    assert loaded_by(
        ("import declip", "torch numpy typer pydantic"),
        ("import declip.cli.app", "torch scipy numpy pydantic yaml jinja2"),
        ("import declip.search.info", "torch scipy huggingface_hub"),
        ("import declip.comparison.study, declip.finetuning.request", "torch timm"),
        (search, "timm torchvision transformers wandb pandas matplotlib torch._dynamo torch"),
        ("import declip.finetuning.run", "torch.distributed.tensor scipy.optimize timm"),
    ) == ["", "", "", "", "torch", ""]


def test_a_file_name_that_no_table_can_hold_is_refused(folder, weights_file, tmp_path, command):
    """A table is UTF-8, so it cannot name the file; with "?" in its place it would name another one."""
    (folder / "red-bar.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    table = tmp_path / "choose.csv"
    told = ["caf\N{REPLACEMENT CHARACTER}.png", "Rename"]
    words = ["choose", weights_file, folder, "--out", table, "--index", tmp_path / "index"]
    command.refused(told, *words)
    assert not table.exists()
