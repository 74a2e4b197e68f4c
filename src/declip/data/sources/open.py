"""Opening a source of pairs by what the user calls it."""

from pathlib import Path

from declip.data.builtin import open_builtin
from declip.data.pair import BUILTIN_PREFIX, PairSource
from declip.data.sources.folder import FolderSource
from declip.data.sources.shard_names import holds_shards, names_shards
from declip.data.sources.shards import CACHE_GB, ShardSource
from declip.data.sources.table import TABLE_KINDS, TableSource
from declip.errors import UserError


def open_source(
    spec: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    image_root: str | Path | None = None,
    shard_cache_gb: float = CACHE_GB,
) -> PairSource:
    """Open a source of pairs.

    Args:
        spec: A built-in set such as "builtin:emoji", a table (.jsonl, .json, .csv, .tsv, .parquet), a folder of images
            with a text file of the same name beside each, one caption a line, or tar shards: a .tar file, a folder of
            them, a pattern, a brace range such as "data/{00000..00331}.tar", a URL, or several joined by "::".
        image_column: Table only: the column that holds the image's path or its bytes.
        caption_column: Table only: the column that holds the caption or a list of captions.
        image_root: Table only: the folder that image paths are relative to, and may not leave. Without it they are
            relative to the table's folder.
        shard_cache_gb: Remote shards only: 10^9 bytes of them kept at most as copies.

    Returns:
        The source; nothing is decoded yet.

    Raises:
        UserError: Nothing is there, it is empty, or it is not a source.
    """
    text = str(spec)
    if text.startswith(BUILTIN_PREFIX):
        return open_builtin(text.removeprefix(BUILTIN_PREFIX))
    if text.lower().endswith(TABLE_KINDS) and names_shards(text):
        raise UserError(
            f"'{text}' names tables that are not one file on this machine. Download them, and name one table, or in a "
            "recipe all of them: data.source=[a.parquet,b.parquet]."
        )
    if names_shards(text):
        return ShardSource(text, shard_cache_gb)
    path = Path(text).expanduser()
    kinds = ", ".join(TABLE_KINDS)
    if path.is_dir():
        if holds_shards(path):
            return ShardSource(text, shard_cache_gb)
        try:
            return FolderSource(path)
        except UserError as error:
            tables = sorted(str(each) for each in path.rglob("*") if each.suffix.lower() in TABLE_KINDS)
            if not tables:
                raise
            raise UserError(
                f"The folder '{text}' holds no image but {len(tables)} tables, such as '{tables[0]}'. Name one table, "
                f"or in a recipe all of them: data.source=[{','.join(tables[:2])}]."
            ) from error
    if not path.exists():
        raise UserError(
            f"There is no file or folder '{text}'. Give a table ({kinds}), a folder of images with captions, tar "
            f"shards such as 'data/{{00000..00331}}.tar', or a built-in set such as '{BUILTIN_PREFIX}emoji'."
        )
    return TableSource(path, image_column, caption_column, image_root)
