"""Whether the losses of two runs can be compared by iteration: Megatron writes a run's arguments into its log. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SAME = """
    seq_length global_batch_size seed text_data data_path train_data_path split tokenizer_type tokenizer_model
    num_layers hidden_size ffn_hidden_size num_attention_heads
""".split()
"""Arguments that decide which tokens an iteration reads, what a loss is of, and how large the model is."""


def told(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Arguments of the last job in a TensorBoard log, as text; of those that it has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    log.Reload()
    tags = {name: tag for name in names if (tag := f"{name}/text_summary") in log.Tags()["tensors"]}
    return {name: log.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for name, tag in tags.items()}


def unit(folder: Path) -> str:
    """What a loss of the run is of: a byte with --text-data, else a token."""
    return "token" if told(folder, ["text_data"]).get("text_data", "None") == "None" else "byte"


def check_comparable(ours: Sequence[Path], dense: Sequence[Path]) -> None:
    """Refuse a dense run of other data or another model: what is less its loss in the same iteration says nothing.

    Args:
        ours, dense: folders of each run's log, one a stage. What one of them does not say is not compared.

    Raises:
        ValueError: every argument that differs, with both values.
    """
    if not dense:
        return
    given, there = told(ours[-1], SAME), told(dense[-1], SAME)
    differ = [name for name in SAME if name in given and name in there and _moved(given[name]) != _moved(there[name])]
    if differ:
        lines = [f"--{name.replace('_', '-')} {there[name]}, of the run {given[name]}" for name in differ]
        raise ValueError(
            f"--dense {dense[-1]} cannot be compared: give a run of the same data and model, or leave --dense out.\n  - "
            + "\n  - ".join(lines)
        )


def _moved(value: str) -> str:
    """A value without the folders of its paths: data may lie elsewhere."""
    return " ".join(word.rsplit("/", 1)[-1] for word in value.split())
