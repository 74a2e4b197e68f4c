"""Models of open_clip (Ilharco et al. 2021, github.com/mlfoundations/open_clip), used as they are.

``open_clip:MODEL/TAG`` takes published weights, which open_clip downloads unless they are in its cache;
``open_clip:MODEL/FILE`` takes weights from a file; ``open_clip:MODEL/none`` takes random weights, always the same;
``open_clip:local-dir:FOLDER``, or the folder's path alone, and ``open_clip:hf-hub:OWNER/NAME`` take a folder, or a
repository, that open_clip wrote.

Nothing in a file or folder can run code: weights are read with ``weights_only``, TorchScript archives are refused,
and so is a configuration that asks for code of its own. A model whose tokenizer is Hugging Face's (SigLIP, CLIPA,
RoBERTa …) needs the package transformers, and fetches the tokenizer by its name unless it is in the cache or folder.
On a machine without network ``HF_HUB_OFFLINE=1`` spares the tries of 20 seconds before a cached file is used.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from declip.data.images.preprocess import LONGEST_SHAPE
from declip.errors import UserError, unknown
from declip.interchange.files import check_file, fetch, quiet, reason

log = logging.getLogger("declip")

PREFIX, FOLDER, HUB, RANDOM = "open_clip:", "local-dir:", "hf-hub:", "none"
CONFIG = "open_clip_config.json"
HERE = f"{PREFIX}MODEL/FILE or {PREFIX}{FOLDER}FOLDER"
IN_FOLDER = ("*.safetensors", "*.bin", "*.pth")
"""Files of weights that open_clip 3.3 looks for in a folder."""

OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's published models keep among their tensors; the shapes say the same."""


def matches(where: str) -> bool:
    """Whether this is a name of open_clip's, or a folder that it wrote."""
    return where.startswith(PREFIX) or (Path(where).expanduser() / CONFIG).is_file()


def which_model(path: str) -> str:
    """Say how a file is named together with its model."""
    return (
        f"Say of which of its models: {PREFIX}MODEL/{path}, where MODEL is for example ViT-B-32 (ViT-B-32-quickgelu "
        f"for weights trained with QuickGELU). In a folder with {CONFIG} it is {PREFIX}{FOLDER}{Path(path).parent}."
    )


def load_open_clip(given: str) -> "OpenClip":
    """Build a model of open_clip's by its name or folder, in evaluation mode, on the CPU, in float32.

    The activation is the tag's: open_clip 3.3 itself computes ``ViT-B-32/openai``, and 26 more of its pairs, with
    GELU although the weights were trained with QuickGELU, and only warns. With a file the name decides:
    ``ViT-B-32-quickgelu/FILE`` for weights trained with QuickGELU.
    """
    given = given if given.startswith(PREFIX) else f"{PREFIX}{FOLDER}{given}"
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"'{given}' needs open_clip ({error}). Install it: pip install 'declip[open_clip]'.") from error
    with quiet("huggingface_hub"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        name, file, options = _resolve(open_clip, given)
        try:
            # A tokenizer's options go to transformers, which runs a folder's own Python when this one says so.
            tokenizer_kwargs = open_clip.get_model_config(name).get("text_cfg", {}).get("tokenizer_kwargs") or {}
            if tokenizer_kwargs.get("trust_remote_code"):
                raise UserError(f"'{given}' asks to run code of its own (trust_remote_code). It is refused.")
            folder = Path(name.removeprefix(FOLDER)) if name.startswith(FOLDER) else None
            for weights in [file] if file else _weights_in(folder) if folder else []:
                check_file(weights)
            tokenizer = _tokenizer(open_clip, given, name)
            model = open_clip.create_model(name, **options)
            if file is not None:
                _load(open_clip, model, file)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(
                f"'{given}' needs the package {error.name}. Install it: pip install {error.name}."
            ) from error
        except Exception as error:  # a file or configuration can be wrong in any way; open_clip checks little
            raise UserError(
                f"Cannot load '{given}': {reason(error)} The weights must be those of the model named, as open_clip "
                "saves them (a state dict, or a checkpoint of its training); download the file again if it is cut."
            ) from error
    config = open_clip.get_model_config(name) | ({"quick_gelu": True} if options.get("force_quick_gelu") else {})
    return OpenClip(model, OpenClipPreprocess(model.visual.preprocess_cfg), tokenizer, config).eval()


class OpenClipPreprocess:
    """open_clip's transform for evaluation, for batches; it stays on the host and can be pickled."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.config = PreprocessCfg(**config)
        self.transform = image_transform_v2(self.config, is_train=False)

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """n images of any size, or one → (n, 3, S, S) float32 on the host."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not images:
            return torch.empty(0, *self.config.input_size)
        return torch.stack([self.transform(self._middle(image)) for image in images])

    def _middle(self, image: Image.Image) -> Image.Image:
        """Without the ends that the crop to a square would cut off anyway, of a very long image."""
        width, height = image.size
        longest = LONGEST_SHAPE * min(width, height)
        if self.config.resize_mode != "shortest" or max(width, height) <= longest:
            return image
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


class OpenClip(nn.Module):
    """A model of open_clip's, a CLIP, CustomTextCLIP or CoCa, with the methods of a `DualEncoder`.

    Attributes:
        config: open_clip's "model_cfg" that it was built from.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: OpenClipPreprocess,
        tokenizer: Callable[[list[str]], Tensor],
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model
        self.preprocessor = preprocess
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.logit_scale.device

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """PIL images → (n, 3, S, S) float32, normalized, on the model's device."""
        return self.preprocessor(images).to(self.device)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Captions → (n, L) int64 on the model's device."""
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts)).to(self.device)

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, d) float32 of length 1."""
        return F.normalize(self.model.encode_image(images, normalize=False).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) ids → (n, d) float32 of length 1."""
        return F.normalize(self.model.encode_text(tokens, normalize=False).float(), dim=-1)

    def encode_backbone(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) normalized → (n, width) float32, the pooled feature before the projection: for probes.

        A tower without a projection (SigLIP's) gives its embedding, not normalized.
        """
        tower = self.model.visual
        hidden = None
        if hasattr(tower, "trunk"):
            hidden = tower.trunk.forward_head(tower.trunk.forward_features(images), pre_logits=True)
        elif getattr(tower, "proj", None) is not None:  # the identity takes the projection's place
            hidden = functional_call(tower, {"proj": torch.eye(len(tower.proj)).to(tower.proj)}, (images,))
        elif hasattr(tower, "attnpool"):
            weight = tower.attnpool.c_proj.weight
            identity = torch.eye(weight.shape[1]).to(weight)
            aside = {"attnpool.c_proj.weight": identity, "attnpool.c_proj.bias": torch.zeros_like(identity[0])}
            hidden = functional_call(tower, aside, (images,))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if hidden is None or hidden.ndim != 2:
            raise UserError("This image tower has no pooled feature before its projection. Use the embedding.")
        return hidden.float()


def _resolve(open_clip: ModuleType, given: str) -> tuple[str, Path | None, dict[str, Any]]:
    """open_clip's name for a model, the file of its weights, and the options that it is created with.

    Published weights are fetched first. The file is None where open_clip finds it by the name, or for random weights.
    """
    spec = given.removeprefix(PREFIX)
    by_name = {"require_pretrained": True, "weights_only": True}
    empty = {"require_pretrained": False, "load_weights": False, "pretrained_text": False}  # without a download
    if spec.startswith(FOLDER):
        folder = Path(spec.removeprefix(FOLDER)).expanduser()
        if not (folder / CONFIG).is_file() or not _weights_in(folder):
            raise UserError(f"'{folder}' is no folder with {CONFIG} and weights ({', '.join(IN_FOLDER)}).")
        return f"{FOLDER}{folder}", None, by_name
    if spec.startswith(HUB):
        from open_clip.pretrained import download_pretrained_from_hf

        fetch(given, lambda: open_clip.get_model_config(spec), HERE)
        fetch(given, lambda: download_pretrained_from_hf(spec.removeprefix(HUB)), HERE)
        return spec, None, by_name
    name, _, weights = spec.partition("/")
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        raise UserError(
            f"'{given}' does not say which weights. Write {PREFIX}{name}/TAG, which downloads, "
            f"{PREFIX}{name}/FILE, or {PREFIX}{name}/{RANDOM} for random ones. Tags: {', '.join(tags) or 'no'}."
        )
    if weights == RANDOM:
        return name, None, empty
    if open_clip.is_pretrained_cfg(name, weights):
        tag = open_clip.get_pretrained_cfg(name, weights)
        of_tag = {"force_preprocess_cfg": tag, "force_quick_gelu": bool(tag.get("quick_gelu"))}
        return name, Path(fetch(given, lambda: open_clip.download_pretrained(tag), HERE)), empty | of_tag
    file = Path(weights).expanduser()
    if not file.is_file():
        if len(file.parts) > 1 or file.suffix:
            raise UserError(f"There is no file '{file}'. Give the path of weights for {name}, or a tag.")
        raise unknown(f"tag or file for open_clip's {name}", weights, [*tags, RANDOM])
    _warn_of_preprocessing(open_clip, name, tags, file)
    return name, file, empty


def _tokenizer(open_clip: ModuleType, given: str, name: str) -> Callable[[list[str]], Tensor]:
    try:
        return open_clip.get_tokenizer(name)
    except (OSError, ValueError) as error:  # transformers', where it is neither in its cache nor fetched, or no file
        if (wanted := open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")) is None:
            raise
        raise UserError(
            f"'{given}' needs the tokenizer '{wanted}', which cannot be read: {reason(error, 160)} "
            f"Connect to the network once, or put weights, tokenizer.json, tokenizer_config.json and {CONFIG} into a "
            f"folder: {PREFIX}{FOLDER}FOLDER."
        ) from error


def _load(open_clip: ModuleType, model: nn.Module, file: Path) -> None:
    """Put a file's weights into a model, all of them and no others."""
    keys = open_clip.load_checkpoint(model, str(file), strict=False, weights_only=True)
    if not keys:  # of NumPy's files, which are read by name
        return
    wrong = [f"{name!r} is missing" for name in keys.missing_keys]
    wrong += [f"{name!r} belongs to another model" for name in keys.unexpected_keys if name not in OPENAI_SIZES]
    if wrong:
        raise ValueError(wrong[0])


def _weights_in(folder: Path) -> list[Path]:
    return [file for pattern in IN_FOLDER for file in folder.glob(pattern)]


def _warn_of_preprocessing(open_clip: ModuleType, name: str, tags: Sequence[str], file: Path) -> None:
    """A file does not say how its images were prepared; open_clip then takes CLIP's way."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    plain = asdict(PreprocessCfg())
    if tags and all(merge_preprocess_dict(plain, open_clip.get_pretrained_cfg(name, tag)) != plain for tag in tags):
        log.warning(
            "Images are prepared CLIP's way for '%s', but otherwise for the published %s models. For those put "
            "the file into a folder with %s and load it as %s%sFOLDER.", file, name, CONFIG, PREFIX, FOLDER,
        )  # fmt: skip
