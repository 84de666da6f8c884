"""The arguments of Megatron that a config.json stands for, and config.json again from the arguments of a run."""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron_lighthouse.convert import rope
from megatron_lighthouse.convert.family import Config, Family
from megatron_lighthouse.convert.mapping import one_kind

OTHER_NAMES: dict[str, tuple[str, Any]] = {
    "--norm-epsilon": ("layernorm_epsilon", None),
    "--disable-bias-linear": ("add_bias_linear", False),
    "--no-yarn-correction-range-round-to-int": ("yarn_correction_range_round_to_int", False),
}
"""Flags whose argument has another name, and what it is where the flag takes no value."""


def model_words(family: Family, config: Config, *, tied: bool, mtp: int = 0) -> list[str]:
    """What shapes the model, as words of a command line.

    Raises:
        ValueError: what Megatron's command line cannot say.
    """
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    sizes, routed = family.sizes(config), family.has_experts(config)
    may_lack = family.plain_rope or not family.positions
    length = config.get("max_position_embeddings") if may_lack else config["max_position_embeddings"]
    grouped = ["--group-query-attention", "--num-query-groups", str(groups)] if groups not in (None, heads) else []
    per_head = [] if family.latent else [*grouped, "--kv-channels", str(sizes["head"])]
    return [
        *("--num-layers", str(config["num_hidden_layers"]), "--hidden-size", str(config["hidden_size"])),
        *("--ffn-hidden-size", str(config["intermediate_size"]), "--num-attention-heads", str(heads), *per_head),
        *(["--max-position-embeddings", str(length)] if length else []),
        *(rope.arguments(config, family.latent) if family.positions else ["--position-embedding-type", "none"]),
        *("--normalization", "RMSNorm", "--norm-epsilon", str(float(config["rms_norm_eps"]))),
        *family.arguments(config),
        *([] if one_kind(family, routed) else ["--moe-layer-freq", f"[{','.join(str(int(here)) for here in routed)}]"]),
        *([] if tied else ["--untie-embeddings-and-output-weights"]),
        *(["--mtp-num-layers", str(mtp)] if mtp else []),
        *("--attention-dropout", "0.0", "--hidden-dropout", "0.0"),
        *("--padded-vocab-size", str(config["vocab_size"])),
    ]


def namespace(words: Sequence[str]) -> Namespace:
    """`model_words` as Megatron's parser would name and read them. What they do not say is not in it."""
    values: dict[str, Any] = {"group_query_attention": False, "untie_embeddings_and_output_weights": False}
    flags = [n for n, word in enumerate(words) if word.startswith("--")]
    for start, end in zip(flags, [*flags[1:], len(words)], strict=True):
        name, alone = OTHER_NAMES.get(words[start], (words[start][2:].replace("-", "_"), True))
        values[name] = _read(words[start + 1]) if end > start + 1 else alone
    return Namespace(**values)


def _read(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except ValueError:
        return word


def updated(config: Config, family: Family, args: Namespace, *, vocab: int, dtype: str, tied: bool) -> dict[str, Any]:
    """config.json of a model that was trained on with `args`: as before, but for its length, RoPE, vocabulary and dtype.

    Raises:
        ValueError: RoPE that its config.json cannot say.
    """
    new = dict(config)
    length = getattr(args, "max_position_embeddings", None)
    if length and family.positions and length != config.get("max_position_embeddings"):
        new["max_position_embeddings"] = length
    if vocab != config["vocab_size"]:
        new["vocab_size"] = vocab
    if tied != config.get("tie_word_embeddings", False):
        new["tie_word_embeddings"] = tied
    name = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if dtype != config.get(name):
        new[name] = dtype
    new.pop("quantization_config", None)  # what is written is not quantised
    if not family.positions:
        return new
    now = rope.from_arguments(args, family.latent)
    if _differs(now, config, family):
        if now["rope_type"] != "default" and family.plain_rope:
            raise ValueError(
                f"RoPE of type {now['rope_type']} has no name in a config.json of {family.architecture}: only default."
            )
        for old in ("rope_theta", "rope_scaling", "rope_parameters"):
            new.pop(old, None)
        if "rope_parameters" in config or "rope_theta" not in config:
            new["rope_parameters"] = now
        else:  # as transformers before 5 reads it
            theta = now.pop("rope_theta")
            new["rope_theta"] = theta
            if not family.plain_rope:
                new["rope_scaling"] = None if now["rope_type"] == "default" else now
    return new


def _differs(now: dict[str, Any], config: Config, family: Family) -> bool:
    """Whether RoPE is another than that of config.json: both as words of Megatron's."""
    base = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "rope_parameters")}
    then = rope.arguments({**base, "rope_parameters": now}, family.latent)
    return namespace(then) != namespace(rope.arguments(config, family.latent))


def changed_fields(before: Config, after: Config) -> list[str]:
    """The fields that differ, a line each."""
    missing = object()
    names = sorted({*before, *after})
    return [
        f"{name}: {_shown(before, name)} -> {_shown(after, name)}"
        for name in names
        if before.get(name, missing) != after.get(name, missing)
    ]


def _shown(config: Config, name: str) -> str:
    return str(config[name]) if name in config else "not there"
