"""Tokenizers as files that the library tokenizers, transformers and open_clip read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from declip.data.text.tokenizer import (
    CaptionTokenizer,
    HuggingfaceTokenizer,
    Tokenizer,
    WrappedTokenizer,
)
from declip.interchange.json_files import write_json
from declip.interchange.layouts import CLIP_MERGES, NO_MERGES

START = "<|startoftext|>"
END = "<|endoftext|>"
PIECE = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # CLIP's pattern, as in `declip.data.text.tokenizer`
REPLACED = (
    ("&amp;", "&"), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&nbsp;", " "),
    (Regex("[\u02bc\u2018-\u201b]"), "'"), (Regex("[\u201c-\u201f]"), '"'), (Regex(r"\s+"), " "),
)  # fmt: skip
"""Common replacements of open_clip's cleaning; others of ftfy (broken encodings, ligatures) cannot be represented."""


def _cleaning(*more: Any) -> Any:
    replaced = (normalizers.Replace(what, by) for what, by in REPLACED)
    return normalizers.Sequence([normalizers.NFC(), *replaced, normalizers.Strip(), *more])


def clip_tokenizer(vocabulary: Mapping[str, int]) -> Tokenizer | None:
    """CLIP's tokenizer with a vocabulary, which has all or the first of its merges; None for another vocabulary."""
    merges = len(vocabulary) - NO_MERGES
    if not 0 <= merges <= CLIP_MERGES:
        return None
    tokenizer = Tokenizer(merges=merges)
    if vocabulary != backend(tokenizer).get_vocab():
        return None
    return tokenizer


def backend(tokenizer: CaptionTokenizer) -> Backend:
    """Build an equal tokenizer of the `tokenizers` library: start, word ids, end, truncated to the context."""
    tokenizer = getattr(tokenizer, "clip", None) or tokenizer
    if isinstance(tokenizer, Tokenizer):
        written = _clip_backend(tokenizer)
    else:
        written = Backend.from_str(tokenizer.library.to_str())
        if isinstance(tokenizer, HuggingfaceTokenizer):
            own = [written.normalizer] if written.normalizer else []
            written.normalizer = _cleaning(*own)
    written.enable_truncation(tokenizer.context)
    return written


def _clip_backend(tokenizer: Tokenizer) -> Backend:
    """CLIP's merges, cleaning and pattern as parts of the library."""
    model = json.loads(tokenizer.library.to_str())["model"]
    vocabulary = {**model["vocab"], START: tokenizer.start, END: tokenizer.end}
    merges = []
    for merge in model["merges"]:
        if isinstance(merge, str):
            merge = merge.split(" ")
        merges.append(tuple(merge))
    written = Backend(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END)
    )
    written.normalizer = _cleaning(normalizers.Lowercase())
    pieces = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    written.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, tokenizer.start), (END, tokenizer.end)]
    )
    written.decoder = decoders.ByteLevel()
    written.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (START, END)]
    )
    return written


def write_tokenizer(tokenizer: CaptionTokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    written = backend(tokenizer)
    written.save(str(folder / "tokenizer.json"))
    inputs = ["input_ids"]
    if not isinstance(tokenizer, WrappedTokenizer):  # towers of SigLIP attend to padding
        inputs.append("attention_mask")
    special = _special_ids(tokenizer)
    config = {
        **{name: written.id_to_token(number) for name, number in special.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",  # CLIP's class would use its own cleaning
        "model_max_length": tokenizer.context,
        "model_input_names": inputs,
        "padding_side": "right",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def _special_ids(tokenizer: CaptionTokenizer) -> dict[str, int]:
    """Special ids by the names that transformers uses."""
    end = tokenizer.end
    if isinstance(tokenizer, HuggingfaceTokenizer):
        ids = {"cls_token": tokenizer.start, "sep_token": end, "mask_token": tokenizer.mask}
        return ids | {"pad_token": tokenizer.padding}
    if isinstance(tokenizer, WrappedTokenizer):
        zeroed = tokenizer.stored["zeroed"]
        last = {"eos_token": end} if zeroed is None else {"sep_token": zeroed}
        return {"pad_token": tokenizer.padding, **last}
    return {"bos_token": tokenizer.start, "eos_token": end, "unk_token": end, "pad_token": end}
