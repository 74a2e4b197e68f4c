"""Tokenizers as files of Hugging Face, with the same ids in `tokenizers` and transformers."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from declip.data.text.tokenizer import CaptionTokenizer, HuggingfaceTokenizer, Tokenizer, WrappedTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
PIECE = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""CLIP's pattern, as in `declip.data.text.tokenizer`."""

REPLACED = (
    ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&nbsp;", " "),
    (Regex("[\u02bc\u2018-\u201b]"), "'"), (Regex("[\u201c-\u201f]"), '"'), (Regex(r"\s+"), " "),
)  # fmt: skip
"""Common replacements of CLIP's cleaning; others of ftfy (broken encodings, ligatures) cannot be represented."""


def backend(tokenizer: CaptionTokenizer) -> Backend:
    """Build an equal tokenizer of the `tokenizers` library: start, word ids, end, truncated to the context."""
    tokenizer = getattr(tokenizer, "clip", None) or tokenizer
    if not isinstance(tokenizer, Tokenizer):
        written = Backend.from_str(tokenizer.library.to_str())
        written.enable_truncation(tokenizer.context)
        return written
    # CLIP's: its merges, cleaning and pattern as parts of the library
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
    """Write tokenizer.json and tokenizer_config.json."""
    written = backend(tokenizer)
    written.save(str(folder / "tokenizer.json"))
    # Special tokens by the names that transformers uses
    start, end, padding = tokenizer.start, tokenizer.end, tokenizer.padding
    if isinstance(tokenizer, HuggingfaceTokenizer):
        ids = {"cls_token": start, "sep_token": end, "mask_token": tokenizer.mask, "pad_token": padding}
    elif isinstance(tokenizer, WrappedTokenizer):
        zeroed = tokenizer.stored["zeroed"]
        ids = {"pad_token": padding, **({"eos_token": end} if zeroed is None else {"sep_token": zeroed})}
    else:
        ids = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    special = {name: written.id_to_token(number) for name, number in ids.items()}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",  # CLIP's class would use its own cleaning
        "model_max_length": tokenizer.context,
        # Towers of SigLIP attend to padding.
        "model_input_names": ["input_ids", *([] if isinstance(tokenizer, WrappedTokenizer) else ["attention_mask"])],
        "padding_side": "right",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
