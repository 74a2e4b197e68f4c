"""Embed the images of images.txt, one path per line, in the jobs of a SLURM array: 1,024 to a file in `rows`.

find pictures/ -name '*.png' > images.txt
sbatch --array=0-7 --wrap 'python slurm_array.py'
declip index from-parquet rows --model runs/demo --out indices/array
"""

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet

import declip

task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1))
images, embedder = Path("images.txt").read_text().splitlines(), declip.Embedder("runs/demo")
Path("rows").mkdir(exist_ok=True)
for start in range(task * 1024, len(images), tasks * 1024):
    part, file = images[start : start + 1024], Path(f"rows/{start:09d}.parquet")
    if not file.exists():  # start a killed job again
        rows = embedder({"id": part, "image": part})
        table = pyarrow.table({**rows, "vector": list(rows["vector"])})
        pyarrow.parquet.write_table(table, f"rows/.{start}")
        os.replace(f"rows/.{start}", file)
