"""What tests of whole ways through the package share."""

import os
import struct
import subprocess
import zlib

import pytest

from interchange.conftest import open_clip_configs

__all__ = ["open_clip_configs"]


def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own; a program that is started fails the test."""
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
    return inside
