"""Embed a table of the columns `id` and `image` with Spark or Daft; `declip index from-parquet` reads the result.

Both ran once on one machine (Spark 4.3, Daft 0.7.26). Each worker process loads the model once.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import declip


def embed_with_spark(images: Any, model: str, out: str) -> None:
    """Write a Spark DataFrame of images as rows with vectors, in Parquet."""
    import pandas

    embedder = declip.Embedder(model)

    def embed(frames: Iterable[Any]) -> Iterator[Any]:
        for frame in frames:
            rows = embedder(frame)
            yield pandas.DataFrame({**rows, "vector": list(rows["vector"])})

    columns = "id string, vector array<float>, error string, model string"
    images.mapInPandas(embed, columns).write.parquet(out)


def embed_with_daft(images: Any, model: str, out: str) -> None:
    """Write a Daft DataFrame of images as rows with vectors, in Parquet."""
    import daft

    text, embedder = daft.DataType.string(), declip.Embedder(model)
    fields = {
        "id": text,
        "vector": daft.DataType.list(daft.DataType.float32()),
        "error": text,
        "model": text,
    }

    @daft.func.batch(return_dtype=daft.DataType.struct(fields))
    def embed(id: daft.Series, image: daft.Series):
        rows = embedder({"id": id.to_pylist(), "image": image.to_pylist()})
        return [
            dict(zip(fields, row, strict=True))
            for row in zip(*(rows[name] for name in fields), strict=True)
        ]

    rows = images.select(embed(images["id"], images["image"]).alias("row"))
    rows.select(*(rows["row"][name].alias(name) for name in fields)).write_parquet(out)
