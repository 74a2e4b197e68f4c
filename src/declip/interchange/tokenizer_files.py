"""Our tokenizer as Hugging Face's files: the same ids in `tokenizers` and transformers.

A file cannot express CLIP's cleaning by ftfy (broken encodings, rare HTML entities, ligatures): clean such captions
first, with `declip.data.text.tokenizer.clean`, or let open_clip do it. Padding is the end token, which pooling ignores;
ours is 0. The text of a special token in a caption is spelled out, as ours is.
"""

import json
import re
import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from declip.data.text.caption_tokenizer import CaptionTokenizer
from declip.data.text.hf_tokenizer import HuggingfaceTokenizer
from declip.data.text.tokenizer import Tokenizer
from declip.data.text.wrapped_tokenizer import WrappedTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
PIECE = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""CLIP's pattern, as in `declip.data.text.tokenizer`."""

REPLACED = (
    ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&nbsp;", " "),
    (Regex("[\u02bc\u2018-\u201b]"), "'"), (Regex("[\u201c-\u201f]"), '"'), (Regex(r"\s+"), " "),
)  # fmt: skip
"""The common replacements of CLIP's cleaning."""


CLEANING: dict[str, list[Any]] = {
    "lowercase": [normalizers.Lowercase()],
    "siglip": [
        normalizers.Lowercase(), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
    ],
}  # fmt: skip
"""Cleaning that transformers' own tokenizer class does, as a part of tokenizer.json."""


def backend(tokenizer: CaptionTokenizer) -> Backend:
    """Build the same tokenizer of the `tokenizers` library: start, the words' ids, end, cut at the context."""
    if isinstance(tokenizer, HuggingfaceTokenizer):
        written = Backend.from_str(tokenizer.library.to_str())
        written.enable_truncation(tokenizer.context)
        return written
    if isinstance(tokenizer, WrappedTokenizer) and tokenizer.stored["definition"] is not None:
        written = Backend.from_str(tokenizer.library.to_str())
        if steps := CLEANING.get(tokenizer.stored["clean"]):
            written.normalizer = normalizers.Sequence([*steps, *([written.normalizer] if written.normalizer else [])])
        return written
    assert isinstance(tokenizer, Tokenizer)
    model = json.loads(tokenizer.library.to_str())["model"]
    vocabulary = {**model["vocab"], START: tokenizer.start, END: tokenizer.end}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    written = Backend(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    replaced = [normalizers.Replace(what, by) for what, by in REPLACED]
    written.normalizer = normalizers.Sequence(
        [normalizers.NFC(), *replaced, normalizers.Lowercase(), normalizers.Strip()]
    )
    written.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    written.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, tokenizer.start), (END, tokenizer.end)]
    )
    written.decoder = decoders.ByteLevel()
    written.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (START, END)])
    written.enable_truncation(tokenizer.context)
    return written


def write_tokenizer(tokenizer: CaptionTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json; of CLIP's vocab.json and merges.txt too."""
    written = backend(tokenizer)
    written.save(str(folder / "tokenizer.json"))
    if isinstance(tokenizer, HuggingfaceTokenizer):
        ids = {
            "cls_token": tokenizer.start, "sep_token": tokenizer.end,
            "mask_token": tokenizer.mask, "pad_token": tokenizer.padding,
        }  # fmt: skip
    elif isinstance(tokenizer, WrappedTokenizer):
        zeroed = tokenizer.stored["zeroed"]
        ids = {"pad_token": tokenizer.padding}
        ids |= {"eos_token": tokenizer.end} if zeroed is None else {"sep_token": zeroed}
    else:
        written.model.save(str(folder))
        ids = {
            "bos_token": tokenizer.start, "eos_token": tokenizer.end,
            "unk_token": tokenizer.end, "pad_token": tokenizer.end,
        }  # fmt: skip
    special = {name: written.id_to_token(number) for name, number in ids.items()}
    plain = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",  # CLIP's own class would put its own cleaning in place of ours
        "model_max_length": tokenizer.context,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(ids[name]): {"content": token, "special": True, **plain} for name, token in special.items()
        },
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
