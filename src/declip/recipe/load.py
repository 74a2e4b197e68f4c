"""Load a recipe: YAML with ancestors and overrides.

``extends: NAME`` starts from another recipe, ``key.sub=value`` overrides a single entry, and a key that does not exist
is an error that names the key meant.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from declip.errors import UserError, unknown
from declip.recipe.schema import Data, Recipe

MOST_YAML, DEEPEST_YAML = 1 << 17, 20
"""Characters and levels of a recipe; ours have some 3,000 and 4."""

SYNONYMS = {
    "train.lr": "learning_rate base_lr max_lr lr_peak peak_lr base_learning_rate",
    "train.min_lr": "lr_end eta_min final_lr lr_min",
    "train.warmup_lr": "lr_start warmup_init_lr",
    "train.steps": "epochs num_train_epochs num_epochs max_epochs max_steps num_steps max_train_steps iterations",
    "train.warmup_steps": "warmup warmup_epochs warmup_ratio num_warmup_steps",
    "train.batch_size": "batch per_device_train_batch_size train_batch_size global_batch_size bs",
    "train.grad_cache_chunk": "accum_freq gradient_accumulation_steps accumulation_steps accumulate_grad_batches",
    "train.grad_checkpointing": "gradient_checkpointing recompute_activations",
    "train.grad_clip_norm": "max_grad_norm clip_norm grad_clip gradient_clip_val",
    "train.weight_decay": "wd weightdecay",
    "train.precision": "amp fp16 bf16 mixed_precision dtype",
    "train.ema_decay": "ema",
    "train.checkpoint_every": "save_steps save_frequency save_every",
    "train.evaluate_every": "eval_steps val_frequency eval_every",
    "train.log_every": "logging_steps log_every_n_steps",
    "train.strategy": "fsdp ddp parallel",
    "train.compile": "torch_compile torchcompile",
    "data.source": "train_data dataset train_dataset data_path train_file path",
    "data.workers": "num_workers dataloader_num_workers",
    "data.max_pairs": "pairs max_train_samples train_num_samples",
    "data.caption_column": "csv_caption_key caption_key text_column",
    "data.image_column": "csv_img_key img_key image_key",
    "evaluation.retrieval": "val val_data validation validation_file eval_dataset",
    "evaluation.zero_shot": "imagenet_val zeroshot",
    "image.model": "model arch architecture backbone vision_model image_encoder model_name timm_model_name",
    "image.size": "image_size img_size resolution force_image_size input_size",
    "text.hf_model": "text_model text_encoder hf_model_name hf_tokenizer_name",
    "text.context_length": "context max_length max_seq_length force_context_length",
    "embed_dim": "projection_dim embedding_dim",
    "loss_weights": "weights losses loss",
    "logit_scale.init": "temperature logit_scale_init_value init_logit_scale",
    "nearest_neighbor.queue_size": "queue",
    "finetune.pretrained": "weights_path checkpoint init_from",
    "finetune.freeze_image_blocks": "lock_image freeze_image freeze freeze_vision",
    "finetune.freeze_text_blocks": "lock_text freeze_text",
    "finetune.layer_decay": "layerwise_lr_decay llrd",
}
"""Names that other tools have for our keys, so that `learning_rate` is not taken for a near-miss of another key."""

ENVIRONMENT = {
    "threads": "OMP_NUM_THREADS",
    "num_threads": "OMP_NUM_THREADS",
    "shard_cache_gb": "DECLIP_SHARD_CACHE_GB",
}
"""Settings of the machine that are environment variables, not recipe keys."""


def read_yaml(text: str) -> Any:
    """Read YAML from an untrusted file: no tag makes an object, and aliases are refused.

    Raises:
        YAMLError: it is not YAML, too long or too deep, or has aliases, of which a few lines can expand to gigabytes.
    """
    if len(text) > MOST_YAML:
        raise yaml.YAMLError(f"it has more than {MOST_YAML:,} characters")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST_YAML:
                raise yaml.YAMLError(f"it has aliases, or more than {DEEPEST_YAML} levels; write it out")
        return yaml.safe_load(text)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a bad date, number …
        raise yaml.YAMLError(str(error)) from error


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("declip.recipe.library")
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names if not name.startswith("_"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, its ancestors and the overrides.

    A recipe's evaluation sets hold for its own ``data.source``: an override or a child recipe that names another source
    starts with none.

    Args:
        name: A shipped recipe's name, or the path of a YAML file.
        overrides: Dotted keys and values, such as ``{"train.steps": 500}``; a value of type str is read as YAML.

    Returns:
        The checked recipe.

    Raises:
        UserError: unknown recipe, unknown key (with the nearest name), or a value that is not allowed.
    """
    given: set[str] = set()
    base, over = _read_tree(name, (), given), dict[str, Any]()
    tree = dict(base)
    for key, value in (overrides or {}).items():
        value = read_value(key, value) if isinstance(value, str) else value
        _set(tree, key, value)
        _set(over, key, value)
        given.update(_leaves({key: value}))
    recipe = _checked(_with_own_sets(tree, base, over), str(name))
    recipe._given = frozenset(given)
    return recipe


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` words of the command line.

    Raises:
        UserError: a word has no ``=``.
    """
    pairs = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise UserError(f"Cannot read the override '{word}'. Write key=value, for example train.steps=500.")
        pairs[key.strip()] = value
    return pairs


def read_value(key: str, value: str) -> Any:
    """Read the value of an override, which is YAML.

    Raises:
        UserError: it is none; names the key.
    """
    try:
        return read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"Cannot read the override '{key}={value}': its value is not valid YAML. Close its brackets, or put it in "
            f"quotes twice, once for the shell: '{key}=\"…\"'."
        ) from error


def _read_tree(name: str | Path, seen: tuple[str, ...], given: set[str]) -> dict[str, Any]:
    """Merge a recipe over its ancestors, and add the keys of the user's own files to `given`."""
    text, label = _read_text(name, Path(seen[-1]).parent if seen else None)
    if label in seen:
        raise UserError(f"The recipe '{label}' extends itself: {' → '.join((*seen, label))}.")
    try:
        tree = read_yaml(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"The recipe '{label}' is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"The recipe '{label}' must be a mapping of keys to values, not {type(tree).__name__}.")
    parent = tree.pop("extends", None)
    if not isinstance(parent, str | None):
        raise UserError(f"The recipe '{label}' has extends: {parent!r}; give one recipe's name or a YAML file.")
    if Path(label).suffix:  # shipped recipes go by their names alone
        given.update(_leaves(tree))
    tree.setdefault("name", Path(label).stem)
    if parent is None:
        return tree
    base = _read_tree(parent, (*seen, label), given)
    return _with_own_sets(_merge(base, tree), base, tree)


def _read_text(name: str | Path, folder: Path | None) -> tuple[str, str]:
    """Read a recipe by path (also relative to the file that extends it), or a shipped one by name."""
    path = Path(name).expanduser()
    if path.suffix in {".yaml", ".yml"}:
        for candidate in filter(None, (path, folder and folder / path)):
            if candidate.is_file():
                return _utf8(candidate), str(candidate)
        raise UserError(f"There is no recipe file '{path}'. Shipped recipes: {', '.join(recipe_names())}.")
    shipped = resources.files("declip.recipe.library") / f"{name}.yaml"
    if str(name) not in recipe_names() and not (folder is not None and shipped.is_file()):
        if name and path.exists():
            what = "a folder" if path.is_dir() else "a file whose name does not end in .yaml"
            raise UserError(
                f"'{name}' is {what}, not a recipe. Give a YAML file, or one of {', '.join(recipe_names())}."
            )
        raise unknown("recipe", str(name), recipe_names())
    return shipped.read_text(encoding="utf-8"), str(name)


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe '{path}' is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        replace = key in {"loss_weights", "model_kwargs"}  # a recipe names its terms and its tower whole
        merged[key] = _merge(merged[key], value) if both and not replace else value
    return merged


def _with_own_sets(tree: dict[str, Any], base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merged tree, without the evaluation sets of `base` where `over` names another source."""
    return tree if _source(tree) == _source(base) else {**tree, "evaluation": over.get("evaluation", {})}


def _source(tree: Mapping[str, Any]) -> Any:
    data, default = tree.get("data"), Data.model_fields["source"].default
    return data.get("source", default) if isinstance(data, Mapping) else default


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree's values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = dict(child) if isinstance(child, Mapping) else {}
        tree = tree[parent]
    tree[last] = value


def _checked(tree: Mapping[str, Any], label: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        raise UserError(f"The recipe '{label}' is not valid. " + " ".join(problems)) from error


def _explain(problem: Mapping[str, Any]) -> str:
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return str(unknown_key(".".join(place)))
    if problem["type"] == "model_type":
        section = ".".join(place)
        first = next((key for key in recipe_keys() if key.startswith(f"{section}.")), f"{section}.…")
        return f"{section}={problem['input']!r}: {section} is a section; set one of its keys, such as {first}."
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{'.'.join(place)}={problem['input']!r}: " if place and problem["type"] != "value_error" else ""
    return f"{where}{message[0].lower()}{message[1:]}."


def unknown_key(given: str) -> UserError:
    """Build the error for an unknown recipe key, with the key meant: by a name of other tools, else by letters."""
    name = given.rpartition(".")[2].lower().replace("-", "_")
    if name in ENVIRONMENT:
        return UserError(f"'{given}' is not a recipe key. Set the environment variable {ENVIRONMENT[name]}.")
    keys = list(recipe_keys())
    meant: dict[str, set[str]] = {}
    for key in keys:
        meant.setdefault(key.rpartition(".")[2], set()).add(key)
    meant |= {word: {key} for key, words in SYNONYMS.items() for word in words.split()}
    found = list(meant.get(name, ())) or get_close_matches(given, keys, n=1, cutoff=0.85)
    if not found:
        found = [key for word in get_close_matches(name, meant, n=1, cutoff=0.8) for key in meant[word]]
    if len(found) == 1:
        return UserError(f"Unknown recipe key '{given}'. Did you mean '{found[0]}'? `declip recipes show` lists all.")
    sections = Recipe.model_fields if "." not in given else ()
    return unknown("recipe key", given, {*keys, *sections})


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of all recipe keys; `loss_weights` is one."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from recipe_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
