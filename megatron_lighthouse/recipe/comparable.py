"""Whether the losses of two runs can be compared by iteration: Megatron writes a run's arguments into its log. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lighthouse.quiet import quiet_imports

SAMPLES = """
    seq_length global_batch_size seed text_data data_path train_data_path data_args_path per_split_data_args_path mock_data
    split mid_level_dataset_surplus tokenizer_type tokenizer_model vocab_file merge_file
    eod_mask_loss reset_position_ids reset_attention_mask dataloader_inter_document_masking sft
    sft_tokenizer_prompt_format
""".split()
"""Arguments that decide which tokens an iteration reads, and which of them count."""
WITH_ATTENTION = ("position_embedding_type", "padded_vocab_size")
"""Of the model, what an attention (Wall has no positions) or a layout brings along."""


def compared() -> list[str]:
    """`SAMPLES`, and the arguments of the model."""
    with quiet_imports():
        from megatron_lighthouse.recipe.same_model import shape

        return [*SAMPLES, *(name for name in shape() if name not in WITH_ATTENTION)]


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
    names = compared()
    given, there = told(ours[-1], names), told(dense[-1], names)
    differ = [name for name in names if name in given and name in there and _moved(given[name]) != _moved(there[name])]
    if differ:
        lines = [f"--{name.replace('_', '-')} {there[name]}, of the run {given[name]}" for name in differ]
        raise ValueError(
            f"--dense {dense[-1]} cannot be compared: give a run of the same data and model, or leave --dense out.\n  - "
            + "\n  - ".join(lines)
        )


def _moved(value: str) -> str:
    """A value without the folders of its paths: data may lie elsewhere."""
    return " ".join(word.rsplit("/", 1)[-1] for word in value.split())
