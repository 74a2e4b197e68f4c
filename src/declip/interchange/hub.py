"""Names on the Hub, ``hf-hub:OWNER/NAME`` with or without ``@REVISION``: fetch the folder of a model."""

from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub

from declip.interchange import declip_file, huggingface, open_clip, open_clip_model
from declip.interchange.files import fetch

PREFIX = open_clip_model.HUB
DESCRIPTION = ["*.json", "*.txt", declip_file.CARD, declip_file.FILE]
"""Files to fetch first: they say of which format the model is. Ours is then whole."""


def folder_of(where: str) -> str:
    """Give the folder of a name's files, fetched unless they are in the cache; other names and paths stay.

    Of a repository with several formats ours is taken, else open_clip's, else transformers'. No pickle is fetched.
    """
    if not where.startswith(PREFIX):
        return where
    repo, revision = huggingface.name_and_revision(where.removeprefix(PREFIX))

    def get(*patterns: str) -> Path:
        download: Any = partial(huggingface_hub.snapshot_download, repo, **revision)
        return Path(fetch(where, partial(download, allow_patterns=list(patterns)), "a folder's path alone"))

    folder = get(*DESCRIPTION)
    if declip_file.matches(str(folder)):
        return str(folder)
    return str(get(*DESCRIPTION, open_clip.WEIGHTS) if open_clip.matches(str(folder)) else get(*huggingface.FETCHED))
