"""Ranks on this machine alone, by torchrun, whatever another launcher has left in the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""The environment of the only rank. It listens on a port that it is given: one found free before may be taken by then."""


def torchrun(ranks: int) -> list[str]:
    """The command that starts `ranks` processes here; `-m MODULE` or a script follow. To be run in `own_environment`."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", str(ranks)]


def own_environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`inherited` without what torchrun takes for its options (`PET_…`, which Kubernetes' PyTorchJob sets) and its Python."""
    return {name: value for name, value in inherited.items() if not name.startswith("PET_") and name != "PYTHON_EXEC"}


def one_rank() -> dict[str, str]:
    """The environment of a run of the entry point as the only rank, from this checkout."""
    # torch takes the allocator's old name before the new, and alone
    allocator = {} if "PYTORCH_ALLOC_CONF" in os.environ else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return {
        **{"CUDA_DEVICE_MAX_CONNECTIONS": "1", **allocator},
        **own_environment(),
        **ALONE,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
