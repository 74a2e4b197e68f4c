"""All built-in sets: fetched, written, checked, built again, opened and pickled."""

import io
import os
import pickle
import shutil
import subprocess
import tarfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from declip.data.sources.download import download
from declip.data.sources.open import open_source
from declip.errors import UserError
from declip_sets import NAMES, fetch
from declip_sets.drawing import fill_square
from declip_sets.fetch import DebianPackage, NpmPackages, Package
from declip_sets.pictures import (
    COLOR,
    GRAY,
    MANIFEST,
    NOTICE,
    TABLE,
    BuiltinSet,
    BuiltinSource,
    Selection,
)
from declip_sets.sets import SET_OF

SIDE = 8
VALUES = {
    "gray": (9, 9, 9),
    "red": (200, 0, 0),
    "copy": (9, 9, 9),
    "white": (255, 255, 255),
    "blue": (0, 0, 200),
}


class FromFolder:
    """A package that is there already."""

    notice = None

    @contextmanager
    def fetched(self):
        yield {"@some/package": Package(self.notice.parent, "1.2", [self.notice])}


class Plain(BuiltinSet):
    """Squares of one color each, and one that is broken."""

    name = "plain"
    layout = 7
    effort = "no time"
    side = SIDE
    packages = FromFolder()
    splits = ("plain", "plain-classes")
    interrupted = False

    def choose(self, packages):
        keys = (*VALUES, "broken")
        return [{"key": key, "kind": key[0], "captions": [key]} for key in keys]

    def pixels(self, row, packages):
        if self.interrupted and row["key"] == "blue":
            raise KeyboardInterrupt
        if row["key"] == "broken":
            return None
        return np.full((SIDE, SIDE, 3), VALUES[row["key"]], np.uint8)

    def credit(self, row):
        return "by nobody"

    def select(self, split, table):
        column = "kind" if split == "plain-classes" else None
        return Selection(table, column)


PLAIN = Plain()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    (tmp_path / "LICENSE").write_text("free")
    monkeypatch.setattr(PLAIN.packages, "notice", tmp_path / "LICENSE")
    PLAIN.download(tmp_path / "cache", progress=False)
    return tmp_path / "cache"


WITHOUT_REPEATED = ["gray", "red", "blue"]
WITH_REPEATED = ["gray", "red", "copy", "blue"]


@pytest.mark.parametrize(("repeated", "kept"), [(False, WITHOUT_REPEATED), (True, WITH_REPEATED)])
def test_what_is_written(cache, repeated, kept, monkeypatch):
    monkeypatch.setattr(PLAIN, "keeps_repeated", repeated, raising=False)
    folder = PLAIN.folder(cache)
    shutil.rmtree(folder)
    PLAIN.download(cache, progress=False)
    source = BuiltinSource(PLAIN, "plain", cache)
    assert [source[index].key for index in range(len(source))] == kept
    for index, key in enumerate(kept):
        assert source[index].open().decoded().getpixel((3, 3)) == VALUES[key]
    assert (folder / COLOR).stat().st_size == 2 * SIDE * SIDE * 3
    assert (folder / GRAY).stat().st_size == (len(kept) - 2) * SIDE * SIDE, "one channel"
    notice = (folder / NOTICE).read_text()
    assert f"\nby nobody: {len(kept)} drawings\n\n\n@some/package 1.2\n" in notice
    assert f"\nDrawn by resvg-py {version('resvg-py')}\n" in notice
    assert (folder / "licenses/@some-package/LICENSE").read_text() == "free"


def test_a_split_with_classes_is_pickled_without_its_images(cache):
    source = BuiltinSource(PLAIN, "plain-classes", cache)
    content = pickle.dumps(source)
    assert len(content) < 500
    for one in (source, pickle.loads(content)):
        assert one.name == "builtin:plain-classes"
        assert one.credit == "by nobody"
        assert one.class_names == ("b", "g", "r")
        assert one.columns["label"].tolist() == [1, 2, 0]
        assert one[2].open().decoded().getpixel((0, 0)) == VALUES["blue"]
    assert "label" not in BuiltinSource(PLAIN, "plain", cache).columns


def spoil_table(folder):
    (folder / TABLE).write_bytes(b"x")


def cut_within_image(folder):
    os.truncate(folder / COLOR, 3)


def cut_after_image(folder):
    os.truncate(folder / COLOR, 3 * SIDE * SIDE)


def remove_images(folder):
    (folder / COLOR).unlink()


def change_layout(folder):
    (folder / MANIFEST).write_text('{"layout": 0}')


@pytest.mark.parametrize(("harm", "reason"), [
    (spoil_table, "Parquet"),
    (cut_within_image, "cannot reshape"),
    (cut_after_image, "images are missing"),
    (remove_images, "No such file"),
    (change_layout, "another version of declip"),
    (shutil.rmtree, "not there yet"),
])  # fmt: skip
def test_damage_is_found_on_opening_and_repaired(cache, harm, reason):
    harm(PLAIN.folder(cache))
    with pytest.raises(UserError, match=reason) as caught:
        BuiltinSource(PLAIN, "plain", cache)
    assert "Run `declip data download builtin:plain` (no time)" in str(caught.value)
    assert "\n" not in str(caught.value)
    PLAIN.download(cache, progress=False)
    assert len(BuiltinSource(PLAIN, "plain", cache)) == 3


def test_an_interrupted_build_leaves_what_was_there(cache, monkeypatch):
    folder = PLAIN.folder(cache)
    monkeypatch.setattr(PLAIN, "interrupted", True, raising=False)
    with PLAIN.packages.fetched() as packages, pytest.raises(KeyboardInterrupt):
        PLAIN.build(packages, folder)
    PLAIN.read(folder)
    assert list(cache.iterdir()) == [folder]


def test_names_are_looked_up(cache, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(cache))
    assert len(SET_OF) == 14
    assert sorted(SET_OF) == list(NAMES)
    for name in SET_OF:
        remedy = f"Run `declip data download builtin:{name.split('-')[0]}`"
        with pytest.raises(UserError, match=remedy):
            open_source(f"builtin:{name}")
    for call in (open_source, download):
        with pytest.raises(UserError, match=r"Unknown built-in set 'emojy'.*'emoji'"):
            call("builtin:emojy")
    monkeypatch.setattr("declip_sets.NAMES", (*NAMES, "plain"))
    monkeypatch.setitem(SET_OF, "plain", PLAIN)
    assert len(open_source("builtin:plain")) == 3
    assert download("builtin:plain") == download("plain", cache) == cache / "plain"


SMALL = DebianPackage("some-data", "usr/share/some")


@pytest.fixture
def tool(monkeypatch):
    """Replace the tools: `act` gets a command and its folder; returns status, output, messages."""

    def replace(act):
        def run(command, cwd=None, **_):
            tool = Path(command[0]).name
            result = act([tool, *command[1:]], Path(cwd))
            return subprocess.CompletedProcess(command, *result)

        monkeypatch.setattr(fetch.subprocess, "run", run)
        monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")

    return replace


NEEDED = ("info.json", "icons.json", "LICENCE-art", "en/LICENSE")
EVIL = ("package/../../evil.json", "package/en/../../../evil.json", "/etc/evil.json")


def write_archive(path, version, members=()):
    """Write an archive of `npm pack`."""
    about = f'{{"version": "{version}"}}'.encode()
    files = {"package/package.json": about} | dict.fromkeys(members, b"{}")
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_npm_packages_are_there_with_their_notices_and_nothing_else(tool):
    asked = []
    inside = [f"package/{path}" for path in (*NEEDED, "index.js")]

    def pack(command, cwd):
        asked.append(command)
        write_archive(cwd / "scope-a-2.tgz", 2, [*inside, *EVIL])
        write_archive(cwd / "a-b-1.tgz", 1)
        return 0, "", ""

    tool(pack)
    with NpmPackages({"@scope/a": "2", "a-b": "1"}).fetched() as packages:
        folder, version, notices = packages["@scope/a"]
        files = [path for path in folder.rglob("*") if path.is_file()]
        written = {path.relative_to(folder).as_posix() for path in files}
        assert written == {"package.json", *NEEDED, "etc/evil.json"}
        beside = {path.name for path in folder.parents[1].iterdir()}
        assert beside == {"@scope", "a-b", "scope-a-2.tgz", "a-b-1.tgz"}
        assert version == "2"
        assert [path.name for path in notices] == ["LICENCE-art", "info.json", "package.json"]
    assert not folder.exists()
    assert asked[0][:4] == ["npm", "pack", "@scope/a@2", "a-b@1"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            "npm error code ENOTFOUND\nnpm error syscall x\nnpm error network no name",
            "network no name.",
        ),
        ("W: unsandboxed\nE: Unable to locate package", "Unable to locate package"),
        ("", "it gave no reason"),
    ],
)
def test_one_line_has_the_reason_of_the_tool_and_the_remedy(
    tool, messages, reason, monkeypatch, tmp_path
):
    monkeypatch.setenv(fetch.FOLDER_VARIABLE, str(tmp_path))
    tool(lambda command, cwd: (1, "", messages))
    debian = "apt-get install some-data`. Elsewhere, .* set DECLIP_DEBIAN"
    remedies = [(NpmPackages({"a": "1"}), "go online"), (SMALL, debian)]
    for packages, remedy in remedies:
        message = f"^[^\n]*fetch the data: {reason}.*{remedy}"
        with pytest.raises(UserError, match=message), packages.fetched():
            pass


def test_a_package_of_debian_is_found_or_fetched_without_root(tool, tmp_path, monkeypatch):
    asked = []

    def run(command, cwd):
        asked.append(command[:2])
        if command[0] == "apt-get":
            (cwd / "some-data_2.1_all.deb").touch()
        else:
            (Path(command[-1]) / SMALL.data).mkdir(parents=True)
        return 0, "", ""

    tool(run)
    monkeypatch.setenv(fetch.FOLDER_VARIABLE, str(tmp_path))
    with SMALL.fetched() as packages:
        assert packages[SMALL.name].folder.is_dir()
    assert not packages[SMALL.name].folder.exists()
    assert asked == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    (tmp_path / SMALL.data).mkdir(parents=True)
    with SMALL.fetched() as packages:
        expected = Package(tmp_path / SMALL.data, "of Debian", [])
        assert packages == {SMALL.name: expected}
    assert len(asked) == 2


def test_a_drawing_fills_the_width_of_its_square_and_keeps_its_shape():
    page = Image.new("RGB", (60, 50), "white")
    page.paste("black", (10, 20, 50, 30))  # 40 x 10
    dark = fill_square(page, 40).mean(axis=2) < 128
    assert (dark.any(axis=0).sum(), dark.any(axis=1).sum()) == (40, 10)
