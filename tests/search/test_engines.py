"""`Embedder` in the engines that call it."""

import os
import signal

import numpy as np
import pytest

import declip
from data.fakes import write_tar


def test_datasets(weights_file, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    paths = sorted(map(str, folder.iterdir()))
    (folder / "z.png").write_bytes(b"no image")
    rows = datasets.Dataset.from_dict({"id": [*paths, "z"], "image": [*paths, str(folder / "z.png")]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    vectors = rows.map(declip.Embedder(weights_file, precision="fp32"), batched=True, batch_size=7,
                       remove_columns=rows.column_names)  # fmt: skip
    assert vectors["error"][-1].startswith("unreadable image")
    vectors.to_parquet(str(tmp_path / "vectors.parquet"))
    index = declip.Index.from_parquet(tmp_path / "vectors.parquet", model=weights_file, out=tmp_path / "made")
    whole = declip.embed(weights_file, folder, out=tmp_path / "whole", precision="fp32")
    assert index.keys() == paths
    assert (index.vectors(index.ids) - whole.vectors(whole.ids)).abs().max() < 1e-3, "float16"


@pytest.mark.slow
def test_ray_with_a_worker_that_is_killed(weights_file, folder, tmp_path, monkeypatch):
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}.items():
        monkeypatch.setenv(name, value)
    import ray
    import ray.data

    # --- shards, which each worker reads by declip's reader
    members = [(f"{n:02d}.{kind}", data) for n, path in enumerate(sorted(folder.iterdir()))
               for kind, data in (("png", path.read_bytes()), ("txt", path.stem.encode()))]  # fmt: skip
    write_tar(tmp_path / "shards/0.tar", members[:24])
    write_tar(tmp_path / "shards/1.tar", members[24:])
    shards, killed = tmp_path / "shards", tmp_path / "killed"
    embedder = declip.Embedder(weights_file, source=shards, precision="fp32")

    def work(batch):
        if 9 in batch["id"] and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return embedder(batch)

    # --- two workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        rows = ray.data.range(24, override_num_blocks=4).map_batches(work, batch_size=None)
        rows.write_parquet(str(tmp_path / "rows"))
    finally:
        ray.shutdown()
    # --- all rows are there, once, and equal those of one process
    assert killed.exists()
    index = declip.Index.from_parquet(tmp_path / "rows", model=weights_file, out=tmp_path / "made", dtype="float32")
    whole = declip.embed(weights_file, shards, out=tmp_path / "whole", precision="fp32", dtype="float32")
    order = np.argsort(index.keys())
    assert [index.keys()[at] for at in order] == whole.keys()
    assert (index.vectors(index.ids[order]) - whole.vectors(whole.ids)).abs().max() < 1e-6
    found = declip.Index.open(index.folder, source=shards)
    assert found.image(0).tobytes() == found.image(int(found.search(image=found.image(0), k=1)[0].id)).tobytes()
