"""`python -m megatron_lighthouse.pretrain_gpt …`: Megatron's GPT pre-training, with `--attention lighthouse`.

Takes the arguments of Megatron-LM's own pretrain_gpt.py, and refuses the few whose work it does not do. Without a GPU,
torch's CUDA calls are first redirected to the CPU (see `megatron_lighthouse.cpu`); with one, that module is never
imported.
"""

from __future__ import annotations

import time

PROGRAM_START = time.time()


def main() -> None:
    """Train as the command line says."""
    from megatron_lighthouse.needed import ask_for_megatron

    ask_for_megatron("megatron_lighthouse.pretrain_gpt")
    import torch

    from megatron_lighthouse.launch import dlprof

    dlprof.start()
    if not torch.cuda.is_available():
        from megatron_lighthouse import cpu

        cpu.install()
    from megatron_lighthouse.mcore.loop.pretrain import run

    run(PROGRAM_START)


if __name__ == "__main__":
    main()
