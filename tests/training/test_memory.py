import gc
import platform
import resource

import pytest
import torch

from declip.training import memory
from declip.training.memory import frozen_garbage, kept_memory


def test_what_was_there_before_is_collected_again_after_the_loop() -> None:
    before = gc.get_freeze_count()
    with frozen_garbage():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == 0


def faults() -> int:
    """Pages that the system gave in two rounds over 64 MB, after a first round that is not counted."""
    for number in range(3):
        if number == 1:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = torch.zeros(1 << 24)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_at_the_end() -> None:
    pages = (1 << 26) // resource.getpagesize()
    with kept_memory():
        assert faults() < pages / 100
    assert faults() > 0.9 * 2 * pages / (512 if huge_pages() else 1)


def huge_pages() -> bool:
    """Whether the system maps large blocks by pages of 2 MB."""
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        return "[always]" in file.read()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    with kept_memory():
        assert torch.zeros(4).sum() == 0
