"""`python -m megatron_lighthouse.pretrain_hybrid …`: as `pretrain_gpt`, for models of `--hybrid-layer-pattern`.

Takes the arguments of Megatron-LM's own pretrain_hybrid.py. Both train either model: the arguments say which. This one asks
for the pattern.
"""

from __future__ import annotations

import sys

from megatron_lighthouse import pretrain_gpt
from megatron_lighthouse.mcore.command_line import kept

FLAGS = ("--hybrid-layer-pattern", "--hybrid-override-pattern", "--use-checkpoint-args", kept.RUN, "--help", "-h")
"""Of which one names the pattern, or asks for help."""


def main() -> None:
    """Train as the command line says."""
    if not {word.partition("=")[0] for word in sys.argv[1:]} & {*FLAGS}:
        print(
            "--hybrid-layer-pattern is missing: give one symbol a layer (* attention, - MLP, E experts, M Mamba …), or train a "
            "GPT with megatron_lighthouse.pretrain_gpt.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
