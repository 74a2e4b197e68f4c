"""Opening a source of pairs by its name."""

from pathlib import Path

from declip.data.builtin import open_builtin
from declip.data.pair import BUILTIN_PREFIX, PairSource
from declip.data.sources.folder import FolderSource
from declip.data.sources.shard_names import holds_shards, names_shards
from declip.data.sources.shards import ShardSource
from declip.data.sources.table import TABLE_KINDS, TableSource
from declip.errors import UserError

SEVERAL_TABLES = "Name one table, or in a recipe all of them: data.source=[a.parquet,b.parquet]."


def open_source(
    spec: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    keyword_column: str = "keywords",
    image_root: str | Path | None = None,
) -> PairSource:
    """Open a source of pairs.

    Args:
        spec: A built-in set such as "builtin:emoji", a table (.jsonl, .json, .csv, .tsv, .parquet), a folder of images
            with a text file of the same name for each, one caption per line, or tar shards: a .tar file, a folder of
            them, a pattern, a brace range such as "data/{00000..00331}.tar", a URL, or several joined by "::".
        image_column: A table's column with image paths or image bytes.
        image_root: Folder of a table's image paths; by default the table's folder.
    """
    text = str(spec)
    if text.startswith(BUILTIN_PREFIX):
        return open_builtin(text.removeprefix(BUILTIN_PREFIX))
    path = Path(text).expanduser()
    if names_shards(text):
        if text.lower().endswith(TABLE_KINDS):
            raise UserError(f"'{text}' is not one table on this machine. {SEVERAL_TABLES}")
        return ShardSource(text)
    if path.is_dir():
        return ShardSource(text) if holds_shards(path) else FolderSource(path)
    if not path.exists():
        raise UserError(
            f"There is no file or folder '{text}'. Give a table ({', '.join(TABLE_KINDS)}), a folder of images with "
            f"captions, tar shards such as 'data/{{00000..00331}}.tar', or a set such as '{BUILTIN_PREFIX}emoji'."
        )
    return TableSource(path, image_column, caption_column, image_root, keyword_column)
