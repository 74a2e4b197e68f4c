import errno
import os
import time
from pathlib import Path

import pytest

from declip.errors import UserError
from declip.io.atomic import atomic_write, cache_folder


def test_the_environment_chooses_the_folder(monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("DECLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/declip")


def test_a_file_or_folder_appears_whole(tmp_path):
    with atomic_write(tmp_path / "a/file") as partial:
        partial.write_text("1")
        assert not (tmp_path / "a/file").exists()
    assert (tmp_path / "a/file").read_text() == "1"
    for value in "23":
        with atomic_write(tmp_path / "a/folder") as partial:
            partial.mkdir()
            (partial / "x").write_text(value)
        assert (tmp_path / "a/folder/x").read_text() == value
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file", "folder"]


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(TypeError), atomic_write(tmp_path / "file") as partial:
        partial.write_text("half") / "no path"
    assert (tmp_path / "file").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    old, new, other = (tmp_path / name for name in (".file.1.partial", ".file.2.partial", ".other.1.partial"))
    for path in (old, new, other):
        path.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    os.utime(other, (time.time() - 90_000,) * 2)
    with atomic_write(tmp_path / "file") as partial:
        partial.write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.2.partial", ".other.1.partial", "file"]


@pytest.mark.parametrize(
    ("code", "told"), [(errno.ENOSPC, "No room left on the disk"), (errno.EROFS, "cannot be written")]
)
def test_a_full_or_forbidden_disk_is_the_users_matter(tmp_path, code, told):
    with pytest.raises(UserError) as caught, atomic_write(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert told in str(caught.value)
    assert "set DECLIP_CACHE to another folder" in str(caught.value)
