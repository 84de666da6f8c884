"""Why what an attention records of its layers cannot be logged as asked. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.mcore.command_line import graphs
from megatron_lighthouse.options import flag_of


def problems(args: argparse.Namespace, name: str, config: Any) -> Iterator[str]:
    """What cannot be as asked, with what would work; `config`, of the attention `name`, has a `telemetry_interval`."""
    if not config.telemetry_interval:
        return
    asked = f"{flag_of(name, 'telemetry_interval')} {config.telemetry_interval}"
    if not args.tensorboard_dir and not getattr(args, "wandb_project", None):
        yield f"{asked} has nowhere to log to: add --tensorboard-dir DIR or --wandb-project NAME."
    if (kind := graphs.kind_of(args)) != "none":
        yield f"{asked} cannot look into the graphs of --cuda-graph-impl {kind}: leave one of them out."
