"""flash-linear-attention's Wall: Llama with forget gates of each channel, g, in place of positions; by choice with others."""

from __future__ import annotations

from megatron_lighthouse.convert.families import fla
from megatron_lighthouse.convert.family import Config, Family, Weight

FIXED = {
    **{name: values for name, values in fla.FIXED.items() if name != "window_size"},
    "qk_norm": (False,),  # its norms have weights for each head, Megatron's one for all
}


def weights(config: Config) -> list[Weight]:
    bias, output = bool(config.get("qkv_bias", False)), config.get("use_output_gate", False)
    if bias and output:
        raise ValueError(
            "config.json's qkv_bias True with use_output_gate cannot be carried over: Megatron's gate has a bias too."
        )
    return [
        *fla.projections("q", *(["o_gate"] if output else []), "k", "v", bias=bias),
        *fla.stream("g", "q", bias=True),
        *(fla.stream("gs", "heads", bias=True) if config.get("use_scalar_gate", False) else []),
    ]


def arguments(config: Config) -> list[str]:
    window = config.get("window_size")  # a token among them, which Megatron does not count
    return [
        *([] if window is None else ["--window-size", f"{window - 1},0"]),
        *("--attention", "wall", "--swiglu", "--disable-bias-linear"),
        *(["--add-qkv-bias"] if config.get("qkv_bias", False) else []),
        *(["--attention-output-gate"] if config.get("use_output_gate", False) else []),
        *(["--wall-scalar-gate"] if config.get("use_scalar_gate", False) else []),
        *("--wall-gate-bias", str(float(config.get("gate_init_bias", 8.0))), "--wall-gate-max", "0.0"),
    ]


FAMILY = Family(
    "WallTransformerForCausalLM",
    fla.ATTENTION,
    fla.sizes,
    arguments,
    dense=fla.MLP,
    fixed=FIXED,
    further=weights,
    embedding=fla.EMBEDDING,
    common=fla.common,
    positions=False,
)
