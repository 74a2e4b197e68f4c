import json
import subprocess
from pathlib import Path

import pytest

from data.tars import write_tar
from declip.data.builtin import fetch
from declip.data.builtin.fetch import DebianPackage, NpmPackages, Package, unpack_npm
from declip.errors import UserError

SMALL = DebianPackage("some-data", "usr/share/some")


def archive(path, files):
    write_tar(path, [(inner, content.encode()) for inner, content in files.items()])


@pytest.fixture
def tool(monkeypatch):
    """Replace the tools: `act` gets a command and its folder, and returns the status, the output and the messages."""

    def replace(act):
        def run(command, cwd=None, **_):
            return subprocess.CompletedProcess(command, *act([Path(command[0]).name, *command[1:]], Path(cwd)))

        monkeypatch.setattr(fetch.subprocess, "run", run)
        monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")

    return replace


def test_unpack_writes_only_what_is_wanted(tmp_path):
    files = {
        "package/package.json": "{}",
        "package/LICENSE": "free",
        "package/json/data.json": "[]",
        "package/index.js": "run()",
        "package/../../evil.json": "{}",
        "package/en/../../../evil.json": "{}",
        "/etc/evil.json": "{}",
    }
    archive(tmp_path / "a.tgz", files)
    unpack_npm(tmp_path / "a.tgz", tmp_path / "out/set")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} - {"a.tgz"}
    assert written == {f"out/set/{name}" for name in ("package.json", "LICENSE", "json/data.json", "etc/evil.json")}


def test_npm_packages_are_there_with_their_notices(tool):
    asked = []

    def pack(command, cwd):
        asked.append(command)
        files = {f"package/{name}": "{}" for name in ("info.json", "icons.json", "LICENCE-art", "en/LICENSE")}
        archive(cwd / "scope-a-2.tgz", {"package/package.json": json.dumps({"version": "2"}), **files})
        archive(cwd / "a-b-1.tgz", {"package/package.json": json.dumps({"version": "1"})})
        return 0, "", ""

    tool(pack)
    with NpmPackages({"@scope/a": "2", "a-b": "1"}).fetched() as packages:
        folder, version, notices = packages["@scope/a"]
        assert (folder / "icons.json").is_file()
        assert not (packages["a-b"].folder / "icons.json").exists()
        found = [path.name for path in notices]
        assert (version, found) == ("2", ["LICENCE-art", "info.json", "package.json"])
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
        (SMALL, "apt-get install some-data`. Elsewhere, .* set DECLIP_DEBIAN to the folder"),
    ):
        with pytest.raises(UserError, match=remedy) as caught, packages.fetched():
            pass
        assert f"fetch the data: {reason}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_package_of_debian_is_found_or_fetched_without_root(tool, tmp_path, monkeypatch):
    asked = []

    def install(root):
        (root / SMALL.data).mkdir(parents=True)

    def run(command, cwd):
        asked.append(command[:2])
        if command[0] == "apt-get":
            (cwd / "some-data_2.1_all.deb").touch()
        else:
            install(Path(command[-1]))
        return 0, "", ""

    tool(run)
    monkeypatch.setenv(fetch.FOLDER_VARIABLE, str(tmp_path))
    with SMALL.fetched() as packages:
        assert packages[SMALL.name].folder.is_dir()
    assert not packages[SMALL.name].folder.exists()
    assert asked == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    install(tmp_path)
    with SMALL.fetched() as packages:
        assert packages == {SMALL.name: Package(tmp_path / SMALL.data, "of Debian", [])}
    assert len(asked) == 2
