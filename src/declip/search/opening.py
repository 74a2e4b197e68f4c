"""The index of a source and a model in the folder "indices": made once, then updated."""

import hashlib
import re
from pathlib import Path
from typing import Any

from declip.data.pair import PairSource
from declip.data.sources.python_items import Items
from declip.data.sources.shard_files import absolute
from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.interchange.read import load
from declip.models.inference import Engine, Precision, fingerprint
from declip.search.embed import embed
from declip.search.index import Index
from declip.search.info import INFO, IndexInfo


def open_or_embed(
    model: str | Path | Encoder,
    source: str | Path | PairSource | Items,
    folder: str | Path | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    engine: Engine = "torch",
    **options: Any,
) -> Index:
    """Open an index, or embed a source into one, with options of `embed`; later calls embed only what is new.

    By default the folder is one below "indices" for each source and model.
    """
    if isinstance(source, str | Path) and (Path(source).expanduser() / INFO).is_file():
        if folder is not None:
            raise UserError(f"'{source}' is an index already, so --index '{folder}' is not used. Remove it.")
        return Index.open(source, model=model, device=device, precision=precision, engine=engine)
    loaded = load(model, device, precision, engine) if isinstance(model, str | Path) else model
    if folder is None:
        if not isinstance(source, str | Path):
            raise UserError("The images are a Python object, which has no path: give the folder of their index.")
        digest = hashlib.sha256(f"{fingerprint(loaded)} {absolute(source)}".encode("utf-8", "surrogateescape"))
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.removeprefix("builtin:")).strip("-") or "source"
        folder = Path("indices") / f"{name[:40]}-{digest.hexdigest()[:8]}"
    given = model if isinstance(model, str | Path) else ""
    known = Path(folder).expanduser()
    captions = IndexInfo.read(known).captions if (known / INFO).is_file() else True
    return embed(loaded, source, out=folder, captions=captions, loaded_from=given, **options)
