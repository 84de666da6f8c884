"""Options of positions that the model would not read, as it asks for others. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

TURNED = """
    rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling no_rope_freq
""".split()
"""Of RoPE, by their names, and what they are where they say nothing (`NOTHING`)."""
YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
"""Of YaRN, in MLA too."""
YARN_ALONE = ("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow")
"""Which MLA, whose rotation has its own, does not read."""
NOTHING = {"rotary_base": 10000, "rotary_percent": 1.0, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
"""Megatron's defaults; None and False where not named."""
OF_TURNING = ("rotary_percent", "rotary_seq_len_interpolation_factor", "rotary_interleaved")
"""What YaRN does not read; nor does MLA, but for the share of its rotated channels with `--rope-type rope`."""
FACTOR = "rope_scaling_factor"
"""Of Llama 3's scaling, of which Megatron's default is 8 also where nothing is scaled."""
LEARNED = ("learned_absolute", "relative")


def problems(args: Namespace) -> Iterator[str]:
    """What is given and has no meaning, each with what works.

    Args:
        args: Megatron's, validated or not.
    """
    kind, latent = args.position_embedding_type, getattr(args, "multi_latent_attention", False)
    kind = "rope" if getattr(args, "use_rotary_position_embeddings", False) else kind
    if not latent and kind in LEARNED:
        for name in [*_given(args, *TURNED), *([FACTOR] if _says_factor(args) else [])]:
            yield (
                f"{_words(args, name)} means nothing with --position-embedding-type {kind} (Megatron's default is "
                "learned_absolute): add --position-embedding-type rope."
            )
    elif getattr(args, "use_rope_scaling", False) and (latent or kind in ("yarn", "mrope")):
        other = "--multi-latent-attention" if latent else f"--position-embedding-type {kind}"
        both = f" and {_words(args, FACTOR)} are" if _says_factor(args) else " is"
        use = ", and use --rope-type yarn with --rotary-scaling-factor" if latent else ""
        yield f"--use-rope-scaling{both} not read with {other}: leave {'it' if both == ' is' else 'them'} out{use}."
    elif _says_factor(args) and not getattr(args, "use_rope_scaling", False):
        use = ", or add that" if kind == "rope" and not latent else ""
        yield f"{_words(args, FACTOR)} means nothing without --use-rope-scaling: leave it out{use}."
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
    for name in _given(args, *(() if latent else YARN), *YARN_ALONE) if latent or kind != "yarn" else ():
        use = "leave it out" + ("" if latent else _for_yarn(args, kind, name))
        yield f"{_words(args, name)} is YaRN's, and {'MLA' if latent else 'the model'} does not read it: {use}."


def _for_yarn(args: Namespace, kind: str, name: str) -> str:
    """What the model could have in place of its rotation, so that it reads an option of YaRN's, or does what that asks for."""
    llama = getattr(args, "use_rope_scaling", False)
    yarn = ", or use --position-embedding-type yarn" + (" in place of --use-rope-scaling" if llama else "")
    yarn += f" and {_words(args, FACTOR)}" if llama and _says_factor(args) else ""
    if name != YARN[0] or kind != "rope":
        return yarn
    scaled = "" if llama else "--use-rope-scaling "
    return f"{yarn}, or {scaled}--rope-scaling-factor {getattr(args, name):g}, Llama 3's, in its place"


def _given(args: Namespace, *names: str) -> list[str]:
    return [name for name in names if getattr(args, name, None) not in (None, False, NOTHING.get(name))]


def _says_factor(args: Namespace) -> bool:
    """Whether the words name it, or, where they are not at hand, another than the default."""
    return FACTOR in getattr(args, "said", ()) or getattr(args, FACTOR, 8.0) != 8.0


def _words(args: Namespace, name: str) -> str:
    value = getattr(args, name)
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
