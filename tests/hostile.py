"""Files that came from elsewhere: what reading one gets, and what it takes."""

import hashlib
import json
import multiprocessing
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from conftest import encoded
from declip.data.pair import BrokenPair
from declip.errors import UserError
from declip.runs.checkpoint import STATE

ROOM = 48
"""MB that reading may take beyond what the process had; the bombs here would take 64 and more, or everything."""

quickly = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def said(work):
    """What a file got: the error's message, the broken pair's reason, or "read". Anything else is raised."""
    try:
        work()
    except UserError as error:
        return str(error)
    except BrokenPair as broken:
        return broken.reason
    return "read"


def apart(work):
    """The same in a process of its own: what the file got, and the MB that reading it took at most."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)

    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)  # should it fail, the machine survives
        found = said(work)
        writer.send((found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = fork.Process(target=child)
    process.start()
    writer.close()
    try:
        assert reader.poll(60), "it hangs"
        return reader.recv()
    except EOFError:
        pytest.fail("it ended the process, or raised what no one catches")
    finally:
        process.kill()
        process.join()


def forge(checkpoint, **changes):
    """Change the state of a checkpoint, and its digest, as an attacker would."""
    state = {**json.loads((checkpoint / STATE).read_text()), **changes}
    del state["digest"]
    digest = hashlib.sha256(json.dumps(state, indent=1).encode()).hexdigest()
    (checkpoint / STATE).write_text(json.dumps({**state, "digest": digest}, indent=1))


def written(kind, **options):
    return encoded(Image.new("RGB", (16, 16), "red"), kind, **options)
