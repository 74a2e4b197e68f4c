"""Choosing images to caption: the order, what is covered already, near-duplicates, the table, and wrong input."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import declip
from conftest import refuses
from declip.data.sources.open import open_source
from declip.search import choose as choosing
from declip.search.facility_location import ALIKE, facility_location


def clusters(count=300, width=8, seed=0):
    """Vectors of length 1 in clusters of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(12, width, generator=generator)
    owners = (torch.rand(count, generator=generator).square() * 12).long()
    return normalize(centers[owners] + 0.6 * torch.randn(count, width, generator=generator) + 1.0, dim=1)


def plain_loop(vectors, known, count):
    mean = vectors.mean(0)
    units = normalize(vectors - mean, dim=1)
    similarity = lambda rows: (units @ rows.T).clamp(min=0) ** 3  # noqa: E731
    covered = similarity(normalize(known - mean, dim=1)).amax(1) if len(known) else torch.zeros(len(units))
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
    assert coverage[-1] <= 1


def test_every_beginning_is_a_choice_and_near_duplicates_come_once():
    vectors = clusters(120)
    doubled = torch.cat([vectors, normalize(vectors + 0.01 * clusters(120, seed=2), dim=1)])
    rows = [row for row, _ in facility_location(doubled, torch.empty(0, 8), 500)]
    assert [row for row, _ in facility_location(doubled, torch.empty(0, 8), 30)] == rows[:30]
    assert len(rows) <= 120
    units = normalize(doubled - doubled.mean(0), dim=1)[rows]
    products = units @ units.T
    assert products.fill_diagonal_(0).max() < ALIKE


def test_pairs_that_are_there_count_as_chosen(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the index of have.csv is written below it
    (folder / "broken.png").write_bytes(b"no image")
    declip.embed(model, folder, out=tmp_path / "index")  # without vectors of captions
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


def test_the_table_is_one_of_pairs_once_it_has_captions(folder, tmp_path, weights_file, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lists").mkdir()
    (folder / "red-bar.png").rename(folder / "=red.png")
    words = ["choose", folder, "--model", weights_file, "--quiet", "--count", 24, "--out"]
    made = command(*words, "lists/first.csv", "--contact-sheet", "sheet.png")
    assert (made.status, "captioned before" in made.out) == (0, True), made.err
    assert Image.open("sheet.png").width > 1000
    rows = list(csv.DictReader(Path("lists/first.csv").read_text().splitlines()))
    keys = [Path(row["image"]).name for row in rows]
    assert keys == [hit.key for hit in declip.choose(weights_file, folder, 24).images]
    assert {row["caption"] for row in rows} == {""}
    assert [float(row["coverage"]) for row in rows] == sorted(float(row["coverage"]) for row in rows)
    with Path("lists/first.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["image", "caption"], *([row["image"], f"shape {n}"] for n, row in enumerate(rows))])
    source = open_source("lists/first.csv")
    assert [source[n].captions[0] for n in range(len(source))] == [f"shape {n}" for n in range(len(rows))]


def test_a_large_source_is_sampled(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "MOST", 12)
    one, same, other = (
        declip.choose(model, folder, 1, index=tmp_path / "index", seed=seed).images[0].key for seed in (0, 0, 1)
    )
    assert (one == same, one == other) == (True, False)
    few = declip.choose(model, folder, 1, index=tmp_path / "index")
    assert (few.compared, "sample of 12 of 24" in few.summary()) == (12, True)


def test_wrong_input(model, folder, tmp_path, command, weights_file):
    refuses("--out", declip.choose, model, folder, out=tmp_path / "x.txt", index=tmp_path / "index")
    refuses("count", declip.choose, model, folder, 0)
    items = [Image.open(folder / "red-bar.png")]
    refuses("keys", declip.choose, model, items, 1, index=tmp_path / "items", out=tmp_path / "x.csv")
    refused = command("choose", folder, "--model", weights_file, "--out", tmp_path / "x.csv", "--have", "gone.csv")
    assert (refused.status, "--have" in refused.err) == (2, True)
