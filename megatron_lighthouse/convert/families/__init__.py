"""The families that can be converted: a file each, a table of names."""

from __future__ import annotations

from megatron_lighthouse.convert.families import deepseek_v3, gpt_oss, llama, parallax, qwen3, qwen3_moe, wall
from megatron_lighthouse.convert.family import Config, Family

MODULES = (llama, qwen3, qwen3_moe, gpt_oss, deepseek_v3, parallax, wall)
FAMILIES = {module.FAMILY.architecture: module.FAMILY for module in MODULES}


def family_of(config: Config) -> Family:
    """Raises ValueError: an architecture without a table, or a field whose value Megatron has no option for."""
    named = config.get("architectures") or ["none"]
    family = FAMILIES.get(named[0])
    if family is None:
        raise ValueError(f"config.json's architectures {named[0]} is not known: {', '.join(FAMILIES)} can be converted.")
    for name, allowed in family.fixed.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            shown = " or ".join(map(str, allowed))
            raise ValueError(f"config.json's {name} {value} cannot be carried over for {named[0]}: only {shown} can.")
    return family
