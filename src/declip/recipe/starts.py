"""Names of pretrained weights, which are checked without importing torch."""

import re
from importlib.util import find_spec
from pathlib import Path

from declip.errors import UserError, unknown

HUB = ("hf-hub", "huggingface")  # prefixes of names of repositories
STARTS = {"builtin:lite0-minilm": 128, "builtin:lite2-minilm": 192}
"""Built-in starts, with the image size on a CPU: 224 and 260 pixels, their own sizes, take 3 and 2 times as long."""


def no_model(given: str) -> UserError:
    """Build the error for weights that are neither a path nor a name that is known."""
    hub = f" Did you mean 'hf-hub:{given}'?" if re.fullmatch(r"[\w.-]+/[\w.-]+", given) else ""
    return UserError(
        f"Cannot find the model '{given}'.{hub} Give a run folder, a checkpoint folder, a weights file, a folder of "
        "transformers' CLIPModel or of open_clip, hf-hub:OWNER/NAME, open_clip:MODEL/TAG, timm:NAME.TAG or "
        "builtin:lite2-minilm."
    )


def check_model(model: str) -> None:
    """Refuse a path that does not exist, or an unknown name, before torch is imported."""
    # open_clip's and timm's names are known; names of repositories are looked up when they are opened.
    prefix, colon, name = model.partition(":")
    if prefix in ("open_clip", "timm") and colon:
        if not name.startswith(("hf-hub:", "local-dir:")) and (package := find_spec(prefix)) and package.origin:
            _check_name(prefix, name, Path(package.origin).parent)
    elif model not in STARTS and not (colon and prefix in HUB) and not Path(model).expanduser().exists():
        raise no_model(model)


def _check_name(library: str, name: str, package: Path) -> None:
    """Look a name up in the files of open_clip or timm, because importing these imports torch."""
    name, _, tag = name.partition("/")
    name = name.partition("+")[0]  # behind it is a text encoder
    if library == "timm":
        name = name.partition(".")[0]
        texts = (path.read_text("utf-8") for path in (package / "models").glob("*.py"))
        known = {found for text in texts for found in re.findall(r"^def (\w+)\(", text, re.MULTILINE)}
    else:
        known = {path.stem for path in (package / "model_configs").glob("*.json")}
    if known and name not in known:
        raise unknown(f"{library} model", name, known)
    # What follows is a tag or a file.
    if library == "open_clip" and tag and not Path(tag).expanduser().exists():
        text = (package / "pretrained.py").read_text("utf-8")
        if not re.search(rf"\b{re.escape(tag.replace('-', '_'))}\b", text, re.IGNORECASE):
            raise unknown("open_clip tag", tag, {*re.findall(r"^ +(\w+)=_\w+\(", text, re.MULTILINE)})
