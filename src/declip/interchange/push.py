"""Uploading a model with its card to a repository of the Hugging Face Hub."""

from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub
from huggingface_hub import HfApi

import declip
from declip.errors import UserError
from declip.interchange.export import export
from declip.interchange.foreign import Refusal
from declip.interchange.model_card import NO_LICENSE
from declip.interchange.weights import one_line
from declip.models.dual_encoder import DualEncoder

REPLACED = (
    *("*.safetensors", "*.onnx", "*_config.json", "config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
)
"""Files of an earlier model, perhaps of another format, which would be read in place of the new one."""


def push(
    model: str | Path | DualEncoder,
    repo: str,
    *,
    private: bool = False,
    format: str | None = None,
    license: str = NO_LICENSE,
) -> str:
    """Upload a model with its card to the Hugging Face Hub, in one commit, and return the repository's address.

    Args:
        model: What `declip.load` takes, or a loaded model. Of a run the card tells data, steps and results.
        repo: OWNER/NAME, created if missing. The files of a model that it holds are replaced.
        private: Only its owner sees the repository; a public one is then refused.
        format: As of `declip.export`; by default "open_clip" where that can express the model, else "safetensors".
        license: For the card: an identifier of the Hub's such as "mit", or any words.
    """
    if huggingface_hub.get_token() is None:
        raise UserError("Pushing needs a token of the Hub that may write: run `hf auth login`, or set HF_TOKEN.")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        try:
            export(model, format or "open_clip", folder, license=license, repo=repo)
        except UserError as error:
            if format is not None or not isinstance(error.__cause__, Refusal):
                raise
            export(model, "safetensors", folder, license=license, repo=repo)
        try:
            return _upload(folder, repo, private)
        except UserError:
            raise
        except Exception as error:  # of the Hub, the network and their libraries
            raise UserError(
                f"Cannot push to '{repo}': {one_line(error, 300).rstrip('.')}. Check the network, and that the token "
                "may write there."
            ) from error


def _upload(folder: Path, repo: str, private: bool) -> str:
    """Make one commit of a folder's files."""
    api = HfApi(library_name="declip", library_version=declip.__version__)
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise UserError(f"'{repo}' is public already, so nothing was pushed. Leave --private out, or rename it.")
    # By name, since a pattern of the Hub's would match within folders too.
    old = [name for name in api.list_repo_files(repo) if "/" not in name and any(fnmatch(name, p) for p in REPLACED)]
    commit = f"Upload by declip {declip.__version__}"
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit, delete_patterns=old)
    return f"{api.endpoint}/{repo}"
