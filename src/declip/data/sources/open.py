"""Opening a source of pairs by its name."""

from pathlib import Path

from declip.data.builtin import open_builtin
from declip.data.pair import BUILTIN_PREFIX, PairSource
from declip.data.sources.folder import FolderSource
from declip.data.sources.shard_names import holds_shards, names_shards
from declip.data.sources.shards import ShardSource
from declip.data.sources.table import TABLE_KINDS, TableSource
from declip.errors import UserError


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
        caption_column: A table's column with captions.
        keyword_column: A table's column with keywords; ignored if missing.
        image_root: Folder of a table's image paths; by default the table's folder.

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
        return ShardSource(text)
    path = Path(text).expanduser()
    if path.is_dir():
        if holds_shards(path):
            return ShardSource(text)
        try:
            return FolderSource(path)
        except UserError as error:
            tables = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in TABLE_KINDS)
            if not tables:
                raise
            raise UserError(
                f"The folder '{text}' holds no image but {len(tables)} tables, such as '{tables[0]}'. Name one table, "
                f"or in a recipe all of them: data.source=[{','.join(tables[:2])}]."
            ) from error
    if not path.exists():
        raise UserError(
            f"There is no file or folder '{text}'. Give a table ({', '.join(TABLE_KINDS)}), a folder of images with "
            f"captions, tar shards such as 'data/{{00000..00331}}.tar', or a set such as '{BUILTIN_PREFIX}emoji'."
        )
    return TableSource(path, image_column, caption_column, image_root, keyword_column)
