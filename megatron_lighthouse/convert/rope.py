"""RoPE in a config.json and in Megatron's arguments. What one of them cannot say is refused by name.

Megatron's command line fixes Llama 3's `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`; for
multi-latent attention it fixes YaRN's `beta_fast`, `beta_slow` and `original_max_position_embeddings`.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_lighthouse.convert.family import Config

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
LATENT_YARN = {**YARN, "original_max_position_embeddings": 4096}
THETA = 10000.0
"""What transformers takes where a config.json says nothing."""


def parameters(config: Config) -> dict[str, Any]:
    """What a config.json says, of either style, with `rope_theta` and `rope_type` in it.

    Raises:
        ValueError: RoPE that is not the same in all layers.
    """
    said = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = said.pop("type", None)
    said.setdefault("rope_type", kind or "default")
    said.setdefault("rope_theta", config.get("rope_theta") or THETA)
    if of := [name for name, value in said.items() if isinstance(value, Mapping)]:
        raise ValueError(f"RoPE of its own for {' and '.join(of)} cannot be carried over: Megatron rotates all layers alike.")
    return {name: value for name, value in said.items() if value is not None}


def arguments(config: Config, latent: bool) -> list[str]:
    """Megatron's words for it.

    Raises:
        ValueError: a kind, or a value, that Megatron's command line cannot say.
    """
    said = parameters(config)
    kind, theta = said["rope_type"], said["rope_theta"]
    if theta != int(theta):
        raise ValueError(f"rope_theta {theta} is no integer, and --rotary-base takes no other.")
    if (part := said.get("partial_rotary_factor", 1.0)) != 1.0 and not latent:
        raise ValueError(f"partial_rotary_factor {part} cannot be carried over: only 1.0 can.")
    base = ["--rotary-base", str(int(theta))]
    if latent:
        return [*base, *_latent(kind, said, config)]
    if kind == "default":
        return ["--position-embedding-type", "rope", *base]
    if kind == "linear":
        factor = _factor(said)
        if factor != int(factor):
            raise ValueError(
                f"linear RoPE's factor {factor} is no integer, and --rotary-seq-len-interpolation-factor takes no other."
            )
        return ["--position-embedding-type", "rope", *base, "--rotary-seq-len-interpolation-factor", str(int(factor))]
    if kind == "llama3":
        _only(said, LLAMA3, "--use-rope-scaling fixes it")
        return ["--position-embedding-type", "rope", *base, "--use-rope-scaling", "--rope-scaling-factor", str(_factor(said))]
    if kind == "yarn":
        return ["--position-embedding-type", "yarn", *base, *_yarn(said, config)]
    raise ValueError(f"rope_type {kind} cannot be carried over: default, linear, llama3 and yarn can.")


def _yarn(said: Mapping[str, Any], config: Config) -> list[str]:
    original = int(said.get("original_max_position_embeddings") or config["max_position_embeddings"])
    factor = float(said.get("factor") or config["max_position_embeddings"] / original)
    scale, all_dim = _mscales(said)
    _concentrated(said, factor, scale, all_dim)
    return [
        *("--rotary-scaling-factor", str(factor), "--yarn-original-max-position-embeddings", str(original)),
        *("--yarn-beta-fast", str(float(said.get("beta_fast", 32)))),
        *("--yarn-beta-slow", str(float(said.get("beta_slow", 1)))),
        *("--mscale", str(scale), "--mscale-all-dim", str(all_dim)),
        *([] if said.get("truncate", True) else ["--no-yarn-correction-range-round-to-int"]),
    ]


def _latent(kind: str, said: Mapping[str, Any], config: Config) -> list[str]:
    """Multi-latent attention takes the scale of its softmax from `mscale_all_dim` too, which must therefore be said."""
    if kind == "default":
        return ["--position-embedding-type", "rope", "--rope-type", "rope"]
    if kind != "yarn":
        raise ValueError(f"rope_type {kind} cannot be carried over for multi-latent attention: default and yarn can.")
    original = {"original_max_position_embeddings": config["max_position_embeddings"]}  # where it is not said
    _only(
        {**original, **said}, {**LATENT_YARN, "truncate": True}, "Megatron's command line fixes it for multi-latent attention"
    )
    if bool(said.get("mscale")) != bool(said.get("mscale_all_dim")):
        raise ValueError("YaRN with one of mscale and mscale_all_dim cannot be carried over: both, or none, can.")
    scale, all_dim = _mscales(said)
    factor = _factor(said)
    _concentrated(said, factor, scale, all_dim)
    words = ["--rotary-scaling-factor", str(factor), "--mscale", str(scale), "--mscale-all-dim", str(all_dim)]
    return ["--position-embedding-type", "rope", "--rope-type", "yarn", *words]


def _mscales(said: Mapping[str, Any]) -> tuple[float, float]:
    """Transformers heeds these two only where both are there, and not 0."""
    scale, all_dim = said.get("mscale"), said.get("mscale_all_dim")
    return (float(scale), float(all_dim)) if scale and all_dim else (1.0, 0.0)


def _factor(said: Mapping[str, Any]) -> float:
    if "factor" not in said:
        raise ValueError(f"config.json's RoPE of type {said['rope_type']} has no factor: without it its angles are not known.")
    return float(said["factor"])


def _concentrated(said: Mapping[str, Any], factor: float, scale: float, all_dim: float) -> None:
    if "attention_factor" in said and not math.isclose(said["attention_factor"], concentration(factor, scale, all_dim)):
        raise ValueError(
            f"YaRN's attention_factor {said['attention_factor']} cannot be carried over: Megatron takes "
            f"{concentration(factor, scale, all_dim)} from factor {factor:g}."
        )


def _only(said: Mapping[str, Any], allowed: Mapping[str, Any], why: str) -> None:
    for name, value in allowed.items():
        if said.get(name, value) != value:
            raise ValueError(f"RoPE's {name} {said[name]} cannot be carried over: {why} at {value}.")


def concentration(factor: float, scale: float, all_dim: float) -> float:
    """By which YaRN multiplies cos and sin (arXiv 2309.00071, section 3.4; with two scales as in DeepSeek-V2)."""
    one, two = (1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0 for m in (scale, all_dim))
    return one / two


def from_arguments(args: Namespace, latent: bool) -> dict[str, Any]:
    """`rope_parameters` of a run's arguments: the inverse of `arguments`."""
    said: dict[str, Any] = {"rope_theta": float(args.rotary_base)}
    if latent:
        if getattr(args, "rope_type", None) == "rope":
            return {**said, "rope_type": "default"}
        scales = {"mscale": args.mscale, "mscale_all_dim": args.mscale_all_dim} if args.mscale_all_dim else {}
        return {**said, "rope_type": "yarn", "factor": args.rotary_scaling_factor, **LATENT_YARN, **scales}
    if args.position_embedding_type == "yarn":
        beta_fast, beta_slow = (getattr(args, name, None) for name in ("yarn_beta_fast", "yarn_beta_slow"))
        scale, all_dim = getattr(args, "mscale", 1.0), getattr(args, "mscale_all_dim", 0.0)
        said |= {"rope_type": "yarn", "factor": args.rotary_scaling_factor}
        said["original_max_position_embeddings"] = args.yarn_original_max_position_embeddings or 4096
        said["beta_fast"] = YARN["beta_fast"] if beta_fast is None else beta_fast
        said["beta_slow"] = YARN["beta_slow"] if beta_slow is None else beta_slow
        if getattr(args, "yarn_correction_range_round_to_int", None) is False:
            said["truncate"] = False
        if scale and all_dim:
            return {**said, "mscale": scale, "mscale_all_dim": all_dim}
        return said if scale == 1 else {**said, "attention_factor": concentration(args.rotary_scaling_factor, scale, all_dim)}
    if args.position_embedding_type != "rope":
        raise ValueError(
            f"--position-embedding-type {args.position_embedding_type} has no name in a config.json of these families."
        )
    if getattr(args, "use_rope_scaling", False):
        return {**said, "rope_type": "llama3", "factor": getattr(args, "rope_scaling_factor", 8.0), **LLAMA3}
    if factor := getattr(args, "rotary_seq_len_interpolation_factor", None):
        return {**said, "rope_type": "linear", "factor": float(factor)}
    return {**said, "rope_type": "default"}
