"""Hugging Face text encoders small enough for tests, written into a folder with random weights."""

import json

import torch
from tokenizers import ByteLevelBPETokenizer

from conftest import TINY, WEIGHTS, Lazy
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe

transformers = Lazy("transformers")
CAPTIONS = (
    "a red circle",
    "Square painted in Blue on white paper!",
    "",
    "  two\tcats,  asleep\non a sofa ",
    "Über dem Café: 日本語 ½",
    "a " * 40,
)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
OFFSET = 2  # RoBERTa's first position


def bert(folder, context=24, model="BertForMaskedLM", **config):
    """An uncased BERT over letters and a few words, as older repositories hold it: vocab.txt without tokenizer.json."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = [
        "red",
        "green",
        "blue",
        "circle",
        "square",
        "triangle",
        "bar",
        "painted",
        "white",
        "paper",
        "in",
        "on",
    ]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *words,
        *letters,
        *(f"##{each}" for each in letters),
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    sizes = {**SIZES, "vocab_size": len(vocabulary), "max_position_embeddings": context, **config}
    return _saved(getattr(transformers, model)(transformers.BertConfig(**sizes)), folder)


def distilbert(folder, context=24):
    bert(folder)
    known = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 48,
        "max_position_embeddings": context,
    }
    return _saved(
        transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(vocab_size=known, **sizes)
        ),
        folder,
    )


def roberta(folder, context=24, kind="Roberta", **config):
    """A cased RoBERTa over bytes and some merges; it pads with 1 and its words begin at 4."""
    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        CAPTIONS, vocab_size=290, min_frequency=1, special_tokens=specials, show_progress=False
    )
    folder.mkdir(parents=True)
    trained.save_model(str(folder))
    transformers.RobertaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    sizes = {
        **SIZES,
        "vocab_size": trained.get_vocab_size(),
        "max_position_embeddings": context + OFFSET,
        **config,
    }
    made = getattr(transformers, f"{kind}Config")(
        pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes
    )
    return _saved(getattr(transformers, f"{kind}ForMaskedLM")(made), folder)


def model_of(folder, weights="clip", **text):
    """A tiny model with the encoder of a folder."""
    keys = {"context_length": 24, "hf_model": str(folder), **text}
    torch.manual_seed(0)
    recipe = Recipe.model_validate({**TINY, "text": keys, "loss_weights": WEIGHTS[weights]})
    return DualEncoder(recipe).eval()


def _saved(model, folder):
    """Save it with weights that no two parameters share a value of: BERT starts from zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
