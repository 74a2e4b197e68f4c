from pathlib import Path

import pytest

from declip.data.sources.open import open_source
from declip.data.sources.subset import take
from declip.errors import UserError


def test_a_larger_part_holds_the_smaller_one(table: Path) -> None:
    source = open_source(str(table))
    small, large = take(source, 5, seed=1), take(source, 12, seed=1)
    keys = {small[i].key for i in range(5)}
    assert len(keys) == len(small) == 5
    assert keys < {large[i].key for i in range(12)}
    assert [small.captions(i) for i in range(5)] == [small[i].captions for i in range(5)]


def test_another_seed_takes_another_part(table: Path) -> None:
    source = open_source(str(table))
    assert take(source, 8, seed=1).indices.tolist() != take(source, 8, seed=2).indices.tolist()


def test_more_than_there_are_is_named(table: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_pairs=25, but 'shapes\.jsonl' has 24"):
        take(open_source(str(table)), 25, seed=0)
