"""Why what Parallax subtracts cannot be logged as asked. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.parallax.config import INTERVAL


def problems(args: argparse.Namespace, config: Any) -> Iterator[str]:
    """What cannot be as asked, with what would work; `config` has a `telemetry_interval`."""
    if not config.telemetry_interval:
        return
    if not args.tensorboard_dir and not getattr(args, "wandb_project", None):
        yield (
            f"{INTERVAL} {config.telemetry_interval} has nowhere to log to: add --tensorboard-dir DIR or --wandb-project NAME."
        )
    if (graphs := getattr(args, "cuda_graph_impl", "none")) != "none":
        yield (
            f"{INTERVAL} {config.telemetry_interval} cannot look into the graphs of --cuda-graph-impl {graphs}: leave one of "
            "them out."
        )
