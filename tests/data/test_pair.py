import pickle

from declip.data.pair import EXAMPLES_KEPT, BrokenPair, SkipCounter


def test_broken_pair_survives_pickling():
    again = pickle.loads(pickle.dumps(BrokenPair("missing image", "a.jpg", "no such file")))
    assert (again.reason, again.key, again.detail) == ("missing image", "a.jpg", "no such file")
    assert str(again) == "missing image: a.jpg (no such file)"
    hostile = BrokenPair("x", "\x1b[2J\u202egnp.\ud800\n" + "a" * 10_000)
    assert hostile.key.startswith("\ufffd[2J\ufffdgnp.\ufffd\ufffdaaa")
    assert (len(hostile.key), str(hostile).isprintable()) == (300, True)


def test_skip_counter_counts_all_and_keeps_few_examples():
    counter = SkipCounter()
    for number in range(9):
        counter.add(BrokenPair("missing image", f"{number}.jpg"))
    counter.add(BrokenPair("empty caption", "x"))
    counter.add(BrokenPair("empty caption", "x"))
    state = counter.to_dict()["reasons"]
    assert list(state) == ["empty caption", "missing image"]
    assert state["missing image"] == {"count": 9, "examples": [f"{n}.jpg" for n in range(EXAMPLES_KEPT)]}
    assert state["empty caption"] == {"count": 2, "examples": ["x"]}
    assert counter.total == 11
    again = SkipCounter.from_dict(counter.to_dict())
    again.add(BrokenPair("empty caption", "y"))
    assert again.total == 12
    assert counter.total == 11
