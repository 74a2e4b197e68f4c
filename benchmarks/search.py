"""Compare search of stored vectors with faiss (as in clip-retrieval) and sentence-transformers.

    pip install faiss-cpu; pip install sentence-transformers --no-deps
    python benchmarks/search.py --sizes 10000 100000 1000000 --json search.json

The vectors lie around a thousand centers, as those of images do, and so do the queries. Ours reads an index as
`declip embed` writes it, mapped from the disk; the others hold float32 in memory. Peers:

- faiss's `IndexFlatIP`, exact, and an inverted file `IVF…,Flat`, both of which clip-retrieval uses through autofaiss
  (which needs pandas, fsspec and more, so faiss is called directly). The inverted file probes the fewest lists,
  a power of two, with which its recall@10 reaches 0.99, tuned on the queries that are timed.
- sentence-transformers' `util.semantic_search`, with `dot_score`: its default would normalize all vectors at each call.

All take turns within one process; the numbers are medians, and recall is that of the ten nearest against a product in
float32. Without a peer's package its rows are a note. The last line is JSON.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.pair import Origin
from declip.search.index import Index
from declip.search.info import IndexInfo, ModelInfo, SourceInfo
from declip.search.store import GROUP_ROWS, Block, IndexedImage
from declip.search.writer import new_index
from timing import machine, medians, row, show, time_turns

WIDTH, CENTERS, K, TARGET = 512, 1_000, 10, 0.99
OURS, OURS_FULL = "declip, exact, float16", "declip, exact, float32"
FLAT, INVERTED, SENTENCE = "faiss, IndexFlatIP", "faiss, IVF Flat", "sentence-transformers"
PACKAGES = {FLAT: "faiss-cpu", INVERTED: "faiss-cpu", SENTENCE: "sentence-transformers"}
FAISS_MISSING = "faiss can't be imported (pip install faiss-cpu)"
SENTENCE_MISSING = (
    "sentence-transformers can't be imported (pip install sentence-transformers --no-deps)"
)


def vectors_of(count: int, width: int, seed: int) -> Tensor:
    """Return (count, width) float32 vectors of length 1 around centers that are the same for every seed."""
    centers = torch.randn(CENTERS, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(CENTERS, (count,), generator=generator)
    return F.normalize(
        centers[chosen].add_(torch.randn(count, width, generator=generator), alpha=0.7), dim=-1
    )


def write_index(folder: Path, vectors: Tensor, dtype: Any) -> Index:
    """Write an index of random vectors."""
    made_by = ModelInfo(path="", name="no model", fingerprint="0" * 64)
    source = SourceInfo(path="", name="made up")

    def blocks() -> Iterator[Block]:
        for ids in torch.arange(len(vectors)).split(GROUP_ROWS):
            rows = [IndexedImage(id, f"{id:09d}.jpg", (), id, Origin()) for id in ids.tolist()]
            yield Block.of(rows, vectors[ids], None, dtype)

    with new_index(
        folder, IndexInfo(model=made_by, source=source, dtype=dtype, captions=False)
    ) as writer:
        for block in blocks():
            writer.add(block)
    return Index.open(folder)


def recall(answers: Tensor, exact: Tensor) -> float:
    """Return the fraction of the exact ids that were found."""
    hits = [len(set(a) & set(b)) for a, b in zip(answers.tolist(), exact.tolist(), strict=True)]
    return sum(hits) / exact.numel()


def peers(
    vectors: Tensor, queries: Tensor, exact: Tensor
) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[Any]]:
    """Return the other libraries' searches, queries → ids, and notes on missing libraries."""
    searches: dict[str, Callable[[Tensor], Tensor]] = {}
    notes: list[Any] = []
    try:
        import faiss
    except ImportError:
        notes.append({"part": "search", "note": FAISS_MISSING})
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
        count, width = vectors.shape
        flat = faiss.IndexFlatIP(width)
        flat.add(vectors.numpy())
        lists = max(1, min(round(4 * math.sqrt(count)), count // 39))
        inverted = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        inverted.train(vectors[:: max(1, count // (64 * lists))].numpy())
        inverted.add(vectors.numpy())
        searches[FLAT] = lambda asked: torch.from_numpy(flat.search(asked.numpy(), K)[1])
        searches[INVERTED] = lambda asked: torch.from_numpy(inverted.search(asked.numpy(), K)[1])
        while recall(searches[INVERTED](queries), exact) < TARGET and inverted.nprobe < lists:
            inverted.nprobe *= 2
    try:
        from sentence_transformers.util import dot_score, semantic_search
    except ImportError:
        notes.append({"part": "search", "note": SENTENCE_MISSING})
    else:

        def sentence(asked: Tensor) -> Tensor:
            answers = semantic_search(asked, vectors, top_k=K, score_function=dot_score)
            return torch.tensor([[hit["corpus_id"] for hit in answer] for answer in answers])

        searches[SENTENCE] = sentence
    return searches, notes


def compare(count: int, width: int, batches: list[int], repeats: int) -> list[dict[str, object]]:
    """Search `count` vectors with batches of queries."""
    vectors, queries = vectors_of(count, width, 1), vectors_of(max(batches), width, 2)
    exact = (queries @ vectors.T).topk(K).indices
    with tempfile.TemporaryDirectory() as folder:
        half = write_index(Path(folder) / "float16", vectors, "float16")
        full = write_index(Path(folder) / "float32", vectors, "float32")
        searches: dict[str, Callable[[Tensor], Tensor]] = {
            OURS: lambda asked: half.nearest(asked, K)[0],
            OURS_FULL: lambda asked: full.nearest(asked, K)[0],
        }
        others, notes = peers(vectors, queries, exact)
        searches |= others
        rows: list[dict[str, object]] = []
        for batch in batches:
            asked = queries[:batch].contiguous()
            turns = {
                name: (lambda search=search, asked=asked: search(asked))
                for name, search in searches.items()
            }
            seconds = medians(time_turns(repeats, turns))
            for name, search in searches.items():
                measured = row(
                    "search", name, seconds[name], batch, "queries", vectors=count, width=width
                )
                rows.append({**measured, "milliseconds": round(1e3 * seconds[name], 3)})
                rows[-1]["recall_at_10"] = round(recall(search(queries), exact), 4)
                if name != OURS:
                    rows[-1]["times_ours"] = round(seconds[name] / seconds[OURS], 2)
                if name in PACKAGES:
                    rows[-1]["version"] = version(PACKAGES[name])
    return rows + notes


def main() -> None:
    """Measure, print a table, and JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="vectors"
    )
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 64], help="queries at once"
    )
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(), "repeats": options.repeats, "rows": []}
    for count in options.sizes:
        result["rows"] += compare(count, options.width, options.batch_size, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result["rows"], ("part", "unit", "width", "microseconds_each"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
