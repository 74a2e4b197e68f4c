"""Repositories of models on the Hub."""

from pathlib import Path

import huggingface_hub

from declip.interchange import declip_file, huggingface, open_clip
from declip.io.hub import fetch

HUGGINGFACE = "huggingface:"
HUB_PREFIXES = ("hf-hub:", HUGGINGFACE, "open_clip:hf-hub:")
DESCRIPTION = ("*.json", "*.txt", "README.md", declip_file.FILE)
"""Files to fetch first, which show the format of the model; for our format they are all files."""


def hub_folder(where: str) -> str:
    """Fetch the files of a repository, unless they are in the cache, and return their folder; keep other names.

    If there are several formats, the order is declip, open_clip, transformers, or with ``huggingface:`` declip,
    transformers, open_clip. Pickle files are not fetched.
    """
    if not where.startswith(HUB_PREFIXES):
        return where
    # First the small files, which show the format; then the weights of that format.
    folder = _fetch(where)
    if declip_file.matches(str(folder)):
        return str(folder)
    weights = huggingface.FILE
    has_config = (folder / huggingface.CONFIG).is_file()
    prefers_transformers = where.startswith(HUGGINGFACE) and has_config
    if open_clip.matches(str(folder)) and not prefers_transformers:
        weights = open_clip.WEIGHTS
    return str(_fetch(where, weights))


def _fetch(where: str, *weights: str) -> Path:
    """Fetch the description of a repository, and files of weights; returns the folder."""
    name = where.rpartition(":")[2]
    repo, _, revision = name.partition("@")

    def download(offline: bool) -> str:
        return huggingface_hub.snapshot_download(
            repo,
            allow_patterns=[*DESCRIPTION, *weights],
            revision=revision or None,
            local_files_only=offline,
        )

    return Path(fetch(where, download, "the path of their folder"))
