"""Ranks on this machine alone, by torchrun, whatever another launcher has left in the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def torchrun(ranks: int) -> list[str]:
    """The command that starts `ranks` processes here; `-m MODULE` or a script follow. To be run in `own_environment`."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", str(ranks)]


def own_environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`inherited` without what torchrun takes for its options (`PET_…`, which Kubernetes' PyTorchJob sets) and its Python."""
    return {name: value for name, value in inherited.items() if not name.startswith("PET_") and name != "PYTHON_EXEC"}
