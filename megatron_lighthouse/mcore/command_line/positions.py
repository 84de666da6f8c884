"""Options of positions that the model would not read, as it asks for others. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

TURNED = ("rotary_base", "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor", "use_rope_scaling")
"""Of RoPE, by their names, and what they are where they say nothing (`NOTHING`)."""
YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
"""Of YaRN, in MLA too."""
YARN_ALONE = ("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow")
"""Which MLA, whose rotation has its own, does not read."""
NOTHING = {"rotary_base": 10000, "rotary_percent": 1.0, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""Megatron's defaults; None and False where not named."""
OF_TURNING = ("rotary_percent", "rotary_seq_len_interpolation_factor", "rotary_interleaved")
"""What YaRN does not read; nor does MLA, but for the share of its rotated channels with `--rope-type rope`."""
LEARNED = ("learned_absolute", "relative")


def problems(args: Namespace) -> Iterator[str]:
    """What is given and has no meaning, each with what works.

    Args:
        args: Megatron's, validated or not.
    """
    kind, latent = args.position_embedding_type, getattr(args, "multi_latent_attention", False)
    kind = "rope" if getattr(args, "use_rotary_position_embeddings", False) else kind
    if not latent and kind in LEARNED:
        for name in _given(args, *TURNED):
            yield (
                f"{_words(args, name)} means nothing with --position-embedding-type {kind} (Megatron's default is "
                "learned_absolute): add --position-embedding-type rope."
            )
    elif getattr(args, "use_rope_scaling", False) and (latent or kind in ("yarn", "mrope")):
        other = "--multi-latent-attention" if latent else f"--position-embedding-type {kind}"
        yield (
            f"--use-rope-scaling is not read with {other}: "
            f"leave it out{', and use --rope-type yarn with --rotary-scaling-factor' if latent else ''}."
        )
    turns = latent and getattr(args, "rope_type", None) == "rope"  # MLA's default is yarn
    for name in _given(args, *OF_TURNING) if latent or kind == "yarn" else ():
        if turns and name == "rotary_percent":
            continue
        by = "--multi-latent-attention" if latent else "--position-embedding-type yarn"
        use = ", or use --rope-type rope" if name == "rotary_percent" else ""
        use = use if latent else ", or use --position-embedding-type rope"
        yield f"{_words(args, name)} is not read with {by}: leave it out{use}."
    for name in _given(args, *YARN) if turns else ():
        use = "leave it out, or use --rope-type yarn"
        yield f"{_words(args, name)} is YaRN's, and --rope-type rope does not turn by it: {use}."
    if not latent and getattr(args, "rope_type", None) == "yarn":
        yield "--rope-type yarn is MLA's: use --position-embedding-type yarn, or leave it out."
    sections = getattr(args, "mrope_section", None)
    if kind == "mrope" and not sections:
        yield (
            "--position-embedding-type mrope needs --mrope-section, three numbers that make half of a head's channels: add it, "
            "or use --position-embedding-type rope."
        )
    elif sections and kind != "mrope":
        words = " ".join(map(str, sections))
        yield f"--mrope-section {words} means nothing without --position-embedding-type mrope: add that, or leave it out."
    if getattr(args, "rope_scaling_factor", 8.0) != 8.0 and not args.use_rope_scaling:
        yield (
            f"--rope-scaling-factor {args.rope_scaling_factor} means nothing without --use-rope-scaling: add it, or leave "
            "--rope-scaling-factor out."
        )
    for name in _given(args, *(() if latent else YARN), *YARN_ALONE) if latent or kind != "yarn" else ():
        use = "leave it out" if latent else "add --position-embedding-type yarn, or leave it out"
        other = " (--use-rope-scaling --rope-scaling-factor is Llama 3's scaling)" if name == YARN[0] else ""
        yield f"{_words(args, name)} is YaRN's, and {'MLA' if latent else 'the model'} does not read it: {use}{other}."


def _given(args: Namespace, *names: str) -> list[str]:
    return [name for name in names if getattr(args, name, None) not in (None, False, NOTHING.get(name))]


def _words(args: Namespace, name: str) -> str:
    value = getattr(args, name)
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
