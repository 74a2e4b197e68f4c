"""What all built-in sets share: fetched, written, checked, made again, opened and pickled."""

import os
import pickle
import shutil
import subprocess
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from conftest import refuses
from data.fakes import write_tar
from declip.data.builtin import fetch
from declip.data.builtin.fetch import DebianPackage, NpmPackages, Package
from declip.data.builtin.pictures import COLOR, GRAY, MANIFEST, NOTICE, TABLE, BuiltinSet, BuiltinSource
from declip.data.builtin.sets import BUILTINS, download
from declip.data.sources.open import open_source
from declip.errors import UserError

SIDE = 8
VALUES = {"gray": (9, 9, 9), "red": (200, 0, 0), "copy": (9, 9, 9), "white": (255, 255, 255), "blue": (0, 0, 200)}


class FromFolder:
    """A package that is there already."""

    notice = None

    @contextmanager
    def fetched(self):
        yield {"@some/package": Package(self.notice.parent, "1.2", (self.notice,))}


class Plain(BuiltinSet):
    """Squares of one color each, and one that is broken."""

    name, layout, effort, side = "plain", 7, "no time", SIDE
    packages = FromFolder()
    splits = ("plain", "plain-classes")
    interrupted = False

    def choose(self, packages):
        return [{"key": key, "kind": key[0], "captions": [key]} for key in (*VALUES, "broken")]

    def pixels(self, row, packages):
        if self.interrupted and row["key"] == "blue":
            raise KeyboardInterrupt
        return None if row["key"] == "broken" else np.full((SIDE, SIDE, 3), VALUES[row["key"]], np.uint8)

    def credit(self, row):
        return "by nobody"

    def select(self, split, table):
        return table, "kind" if split == "plain-classes" else None, ()


PLAIN = Plain()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    (tmp_path / "LICENSE").write_text("free")
    monkeypatch.setattr(PLAIN.packages, "notice", tmp_path / "LICENSE")
    PLAIN.download(tmp_path / "cache", progress=False)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("repeated", "kept"), [(False, ["gray", "red", "blue"]), (True, ["gray", "red", "copy", "blue"])]
)
def test_what_is_written(cache, repeated, kept, monkeypatch):
    monkeypatch.setattr(PLAIN, "keeps_repeated", repeated, raising=False)
    folder = PLAIN.folder(cache)
    shutil.rmtree(folder)
    PLAIN.download(cache, progress=False)
    source = BuiltinSource(PLAIN, "plain", cache)
    found = [(source.key(i), source[i].image.getpixel((3, 3))) for i in range(len(source))]
    assert found == [(key, VALUES[key]) for key in kept]
    assert (folder / COLOR).stat().st_size == 2 * SIDE * SIDE * 3
    assert (folder / GRAY).stat().st_size == (len(kept) - 2) * SIDE * SIDE, "a third of the room"
    notice = f"\nby nobody: {len(kept)} drawings\n\n\n@some/package 1.2\nDrawn by resvg-py {version('resvg-py')}\n"
    assert notice in (folder / NOTICE).read_text()
    assert (folder / "licenses/@some-package/LICENSE").read_text() == "free"


def test_a_split_with_classes_is_pickled_without_its_images(cache):
    source = BuiltinSource(PLAIN, "plain-classes", cache)
    content = pickle.dumps(source)
    assert len(content) < 500
    for one in (source, pickle.loads(content)):
        assert (one.name, one.credit) == ("builtin:plain-classes", "by nobody")
        assert (one.class_names, one.labels.tolist()) == (("b", "g", "r"), [1, 2, 0])
        assert one[2].image.getpixel((0, 0)) == VALUES["blue"]
    assert BuiltinSource(PLAIN, "plain", cache).labels is None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / TABLE).write_bytes(b"x"), "Parquet"),
        (lambda f: os.truncate(f / COLOR, 3), "cannot reshape"),
        (lambda f: os.truncate(f / COLOR, 3 * SIDE * SIDE), "images are missing"),
        (lambda f: (f / COLOR).unlink(), "No such file"),
        (lambda f: (f / MANIFEST).write_text('{"layout": 0}'), "another version of declip"),
        (shutil.rmtree, "not there yet"),
    ],
)
def test_damage_is_found_on_opening_and_repaired(cache, harm, reason):
    harm(PLAIN.folder(cache))
    refuses([reason, "Run `declip data download builtin:plain` (no time)"], BuiltinSource, PLAIN, "plain", cache)
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
    assert len(BUILTINS) == 14
    for name in BUILTINS:
        refuses(f"Run `declip data download builtin:{name.split('-')[0]}`", open_source, f"builtin:{name}")
    monkeypatch.setitem(BUILTINS, "plain", PLAIN)
    assert len(open_source("builtin:plain")) == 3
    assert download("builtin:plain") == download("plain", cache) == cache / "plain"


SMALL = DebianPackage("some-data", "usr/share/some")


@pytest.fixture
def tool(monkeypatch):
    """Replace the tools: `act` gets a command and its folder, and returns the status, the output and the messages."""

    def replace(act):
        def run(command, cwd=None, **_):
            return subprocess.CompletedProcess(command, *act([Path(command[0]).name, *command[1:]], Path(cwd)))

        monkeypatch.setattr(fetch.subprocess, "run", run)
        monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")

    return replace


def test_npm_packages_are_there_with_their_notices_and_nothing_else(tool, tmp_path):
    asked, evil = [], ("package/../../evil.json", "package/en/../../../evil.json", "/etc/evil.json")
    files = ("package/info.json", "package/icons.json", "package/LICENCE-art", "package/en/LICENSE", "package/index.js")

    def pack(command, cwd):
        asked.append(command)
        for name, version, inner in (("scope-a", 2, (*files, *evil)), ("a-b", 1, ())):
            about = ("package/package.json", b'{"version": "%d"}' % version)
            write_tar(cwd / f"{name}-{version}.tgz", [about, *((path, b"{}") for path in inner)])
        return 0, "", ""

    tool(pack)
    with NpmPackages({"@scope/a": "2", "a-b": "1"}).fetched() as packages:
        folder, version, notices = packages["@scope/a"]
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert written == {"package.json", "info.json", "icons.json", "LICENCE-art", "en/LICENSE", "etc/evil.json"}
        assert {path.name for path in folder.parents[1].iterdir()} == {"@scope", "a-b", "scope-a-2.tgz", "a-b-1.tgz"}
        assert (version, [path.name for path in notices]) == ("2", ["LICENCE-art", "info.json", "package.json"])
    assert not folder.exists()
    assert asked[0][:4] == ["npm", "pack", "@scope/a@2", "a-b@1"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("npm error code ENOTFOUND\nnpm error syscall x\nnpm error network no name", "network no name."),
        ("W: unsandboxed\nE: Unable to locate package", "Unable to locate package"),
        ("", "it gave no reason"),
    ],
)
def test_one_line_has_the_reason_of_the_tool_and_the_remedy(tool, messages, reason, monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.FOLDER_VARIABLE, str(tmp_path))
    tool(lambda command, cwd: (1, "", messages))
    for packages, remedy in (
        (NpmPackages({"a": "1"}), "go online"),
        (SMALL, "apt-get install some-data`. Elsewhere, .* set DECLIP_DEBIAN"),
    ):
        with pytest.raises(UserError, match=f"^[^\n]*fetch the data: {reason}.*{remedy}"), packages.fetched():
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
        assert packages == {SMALL.name: Package(tmp_path / SMALL.data, "of Debian", [])}
    assert len(asked) == 2
