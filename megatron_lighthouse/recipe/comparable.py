"""Whether a run's losses can be asked what a switch cost, and be compared with another's: by the arguments in their logs. Ours.

Megatron writes them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_lighthouse.quiet import quiet_imports
from megatron_lighthouse.variants import VARIANTS, switching

SAMPLES = """
    seq_length global_batch_size seed text_data data_path train_data_path data_args_path per_split_data_args_path mock_data
    split mid_level_dataset_surplus tokenizer_type tokenizer_model vocab_file merge_file
    eod_mask_loss reset_position_ids reset_attention_mask dataloader_inter_document_masking sft
    sft_tokenizer_prompt_format
""".split()
"""Arguments that decide which tokens an iteration reads, and which of them count."""
NAMED = 3
"""Words of a value that are shown, from where it differs."""
WITH_ATTENTION = ("position_embedding_type", "padded_vocab_size")
"""Of the model, what an attention (Wall has no positions) or a layout brings along."""


def compared() -> list[str]:
    """`SAMPLES`, and the arguments of the model."""
    with quiet_imports():
        from megatron_lighthouse.recipe.same_model import shape

        return [*SAMPLES, *(name for name in shape() if name not in WITH_ATTENTION)]


def told(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Arguments of the last job in a TensorBoard log, as text; of those that it has."""
    return {name: values[-1] for name, values in of_jobs(folder, names).items()}


def of_jobs(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The same of each job in a log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    log.Reload()
    tags = {name: tag for name in names if (tag := f"{name}/text_summary") in log.Tags()["tensors"]}
    return {name: [one.tensor_proto.string_val[0].decode() for one in log.Tensors(tag)] for name, tag in tags.items()}


def unit(folder: Path) -> str:
    """What a loss of the run is of: a byte with --text-data, else a token."""
    return "token" if told(folder, ["text_data"]).get("text_data", "None") == "None" else "byte"


def check_switches(folders: Sequence[Path], layers: Iterable[float]) -> None:
    """Refuse a run whose layers never selected: none became dense. One whose log does not say its attention is not refused.

    Args:
        folders: of its log, one a stage.
        layers: how many used Lighthouse, where that was logged.

    Raises:
        ValueError: what it was trained with.
    """
    jobs = [of_jobs(folder, ["attention", "spec"]) for folder in folders]
    named = [name for job in jobs for name in job.get("attention", [])]
    by_spec = any(spec != "None" for job in jobs for spec in job.get("spec", []))  # which brings an attention of its own
    switches = any(name in VARIANTS and VARIANTS[name].switches for name in named)
    if named and not (switches or by_spec or any(layers)):
        raise ValueError(
            f"{folders[-1]} is of --attention {named[-1]} alone: none of its layers became dense, so no switch cost anything. "
            f"Give a run that began with {switching()}."
        )


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
        pairs = {name: from_where_they_differ(there[name].split(), given[name].split()) for name in differ}
        lines = [f"--{name.replace('_', '-')} {dense}, of the run {run}" for name, (dense, run) in pairs.items()]
        raise ValueError(
            f"--dense {dense[-1]} cannot be compared: give a run of the same data and model, or leave --dense out.\n  - "
            + "\n  - ".join(lines)
        )


def _moved(value: str) -> str:
    """A value without the folders of its paths: data may lie elsewhere."""
    return " ".join(word.rsplit("/", 1)[-1] for word in value.split())


def from_where_they_differ(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    """Two values that differ, of many words maybe: the first few of each that are not the same."""
    same = [*(a == b for a, b in zip(one, other, strict=False)), False].index(False)
    return _few(one, same), _few(other, same)


def _few(words: Sequence[str], start: int) -> str:
    if len(words) <= NAMED:
        return " ".join(words)
    shown = [*["…"] * (start > 0), *words[start : start + NAMED], *["…"] * (start + NAMED < len(words))]
    return f"{' '.join(shown)} ({len(words)} in all)"
