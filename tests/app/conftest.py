"""An app over the pairs of the shared table, as the model of a short run sees them."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from conftest import COLORS, SHAPES, draw, once, write_table
from indices import built_in, explained, folder, model, weights_file

__all__ = ["built_in", "explained", "folder", "model", "weights_file"]
PAGE = "http://127.0.0.1:8765"
NAMES = [f"{color}-{shape}-{side}" for side in (32, 48) for color in COLORS for shape in SHAPES]

collect_ignore_glob = [] if find_spec("starlette") and find_spec("uvicorn") else ["test_*.py"]


@pytest.fixture(scope="session")
def shared(tiny_run, table, tmp_path_factory):
    from declip.app.server import open_state

    return open_state(str(tiny_run), str(table), tmp_path_factory.mktemp("page") / "index")


def ask(state, **options):
    from starlette.testclient import TestClient

    from declip.app.server import build

    return TestClient(build(state, "127.0.0.1"), base_url=PAGE, headers={"Origin": PAGE}, **options)


def assert_refused(answer, part, status=400):
    """An answer that says in a sentence what is wrong."""
    assert answer.status_code == status, answer.text
    assert part in answer.json()["error"]


@pytest.fixture
def state(shared):
    """The state without the comparisons of earlier tests."""
    shared.compared.clear()
    shared.stopped.clear()
    return shared


@pytest.fixture
def client(state):
    with ask(state) as asked:
        yield asked


@pytest.fixture(scope="session")
def uncaptioned(tmp_path_factory):
    return once(tmp_path_factory, "uncaptioned", draw_uncaptioned) / "choose.csv"


def draw_uncaptioned(folder):
    for name in NAMES:
        color, shape, side = name.split("-")
        draw(color, shape).resize((int(side), int(side))).save(folder / f"{name}.png")
    write_table(folder / "choose.csv", [f"{name}.png," for name in NAMES])


@pytest.fixture(scope="session")
def opened(tiny_run, uncaptioned, tmp_path_factory):
    from declip.app.server import open_state

    return open_state(
        str(tiny_run), str(uncaptioned), tmp_path_factory.mktemp("captions") / "index"
    )


@pytest.fixture
def start(opened, tmp_path):
    """Starts captioning into a file, as a start of the server does."""
    from declip.app.captions import Captioning

    return lambda name="captions.csv": replace(
        opened, captioning=Captioning(opened, tmp_path / name)
    )
