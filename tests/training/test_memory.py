import gc
import platform
import subprocess
import sys

import pytest
import torch

from declip.training import memory
from declip.training.memory import frozen_garbage, kept_memory


def test_what_was_there_before_is_collected_again_after_the_loop() -> None:
    before = gc.get_freeze_count()
    with frozen_garbage():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0


FAULTS = """
import resource
import torch
from declip.training.memory import kept_memory

def faults():
    for number in range(3):
        if number == 1:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = torch.zeros(1 << 24)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
with kept_memory():
    print(before, faults())
"""
"""Prints the pages that the system gives in two rounds over 64 MB, after one that is not counted."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """In a process of its own: what this one freed before would be taken."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    usual, kept = map(int, ran.stdout.split())
    assert kept < usual / 10


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    with kept_memory():
        assert torch.zeros(4).sum() == 0
