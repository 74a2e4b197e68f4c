"""Worker processes that outlive the process which started them."""

import multiprocessing
import time

from declip.io import pool


def test_workers_end_when_the_main_process_was_killed(monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.2)
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def start_and_wait():
        results = pool.computed(bytes, [1 << 20] * 8, workers=2)
        sending.send(len(next(results)))  # the next ones fill the pipe, and nobody reads them
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=start_and_wait)
    process.start()
    sending.close()
    assert receiving.recv() == 1 << 20
    process.kill()
    process.join()
    assert receiving.poll(20), "its other end is closed when the last worker ends"
