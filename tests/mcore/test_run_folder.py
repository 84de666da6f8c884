"""What a run leaves for the next command: its arguments, which `--run-folder FOLDER` takes; and evaluation by its tokenizer."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from pathlib import Path

import numpy
import pytest

from megatron_lighthouse.mcore.command_line import kept
from megatron_lighthouse.mcore.data import text
from megatron_lighthouse.recipe import begun, comparable, passkey, variables
from megatron_lighthouse.recipe.comparable import check_comparable
from megatron_lighthouse.recipe.of_run import log_folder, of_one_sequence
from megatron_lighthouse.recipe.probe import Grid
from megatron_lighthouse.recipe.readers import reader_of
from megatron_lighthouse.variants import VARIANTS
from tests.mcore.harness import ROOT, run
from tests.mcore.test_evaluate import evaluate
from tests.mcore.upstream_reads import reads
from tests.variable_reader import read

END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of this project's licence, as Hugging Face keeps one."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    made = ByteLevelBPETokenizer()
    made._tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    made.train([str(ROOT / "LICENSE")], vocab_size=600, special_tokens=[END], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END).save_pretrained(folder)
    return folder


def test_a_run_of_tokens_is_evaluated_by_its_folder_alone(tokenizer: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    words, checkpoints = (ROOT / "LICENSE").read_text(), tmp_path / "checkpoints"
    by = AutoTokenizer.from_pretrained(tokenizer)
    tokens = numpy.array([*by(words).input_ids, by.eos_token_id], dtype=numpy.int32)
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=numpy.int32)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "data.idx"))
    data = ["--data-path", str(tmp_path / "data"), "--split", "100,0,0", "--train-iters", "2"]
    data += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    run(tmp_path / "run", "--attention", "lighthouse", "--save", str(checkpoints), "--save-interval", "2", data=data)
    (tmp_path / "held-out.txt").write_text(words[:4000])
    asked = ["--held-out", str(tmp_path / "held-out.txt"), "--out", str(tmp_path / "out"), "--passkey-samples", "1"]
    result = evaluate(
        1, "--run-folder", str(checkpoints), *asked, "--passkey-lengths", "128", "--loss-sequences", "2", model=[]
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "end of arguments" not in result.stdout  # hundreds of lines above what was asked for
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["iteration"], found["attention"], found["lighthouse_layers"]) == (2, "lighthouse", 2)
    assert found["held_out"]["tokens"] == len(by(words[:4000]).input_ids) + 1
    assert found["loss"]["unit"] == "token"
    assert 3 < found["loss"]["mean"] < 10
    assert "nats per token" in result.stdout
    assert found["passkey"]["fillers"]["noise"]["samples"] == 5
    assert log_folder(checkpoints) == tmp_path / "run" / "tensorboard"  # for the recovery report


def test_the_probe_in_tokens_says_what_it_says_in_bytes(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    by = AutoTokenizer.from_pretrained(tokenizer)
    reader = reader_of(Namespace(tokenize=by.encode, eod=by.eos_token_id, bos=None), "HuggingFaceTokenizer")
    filler = reader.encode((ROOT / "LICENSE").read_text())
    for probe, values, length in ((passkey.PROBE, [0, 0.5, 1], 128), (variables.PROBE, [0, 2], 400)):
        grid = Grid(probe, probe.words(reader.encode), [length], values, 10)
        for sample in grid.questions():
            asked = grid.prompt(sample, filler)
            assert len(asked.tokens) == length
            said = str(by.decode([*asked.tokens.tolist(), asked.digits[sample.digit]]))
            if probe is variables.PROBE:
                assert read(said) == (sample.digit, sample.at)
            else:
                assert said.endswith(f"What is the pass key? The pass key is {sample.digit}")
                assert (
                    f"The pass key is {sample.digit}. Remember it." in by.decode(asked.tokens[asked.places[0] :].tolist())[:40]
                )
    assert reader.document(b"The pass key").tolist() == [*by.encode("The pass key"), by.eos_token_id]


def encoder(vocabulary: list[str]) -> object:
    """The longest piece of a vocabulary first, else characters, which begin at 1000."""

    def encode(content: str) -> numpy.ndarray[int, numpy.dtype[numpy.int64]]:
        found = []
        while content:
            piece = max((word for word in vocabulary if content.startswith(word)), key=len, default=content[0])
            found.append(vocabulary.index(piece) if piece in vocabulary else 1000 + ord(piece))
            content = content[len(piece) :]
        return numpy.array(found)

    return encode


def test_a_digit_with_the_blank_before_it_is_one_token_and_digits_in_pieces_are_refused() -> None:
    words = passkey.Words(encoder([f" {digit}" for digit in range(10)]))  # type: ignore[arg-type]
    assert words.question.digits == list(range(10))
    assert words.question.tokens[-1] == 1000 + ord("s")  # of "is", the blank being the digit's
    for probe, pieces in ((passkey.PROBE, [" is 1", "is 2"]), (variables.PROBE, ["M = 1"])):
        with pytest.raises(ValueError, match=f"each of the ten digits one of its own: use --{probe.name}-samples 0"):
            probe.words(encoder(pieces))  # type: ignore[arg-type]


def test_null_tokenizers_read_no_text() -> None:
    with pytest.raises(ValueError, match="--tokenizer-type NullTokenizer reads no text"):
        reader_of(Namespace(), "NullTokenizer")
    assert not text.reads_bytes(Namespace(tokenizer_type="NullTokenizer", null_tokenizer_eod_id=None))


RUN = ["--attention", "lighthouse", "--save", "ckpt", "--load=begin", "--finetune", "--text-data", "a.txt", "b.txt"]
RUN += ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel", "--lr", "-1"]


def test_arguments_are_kept_and_taken_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    args = Namespace(rank=0, world_size=4, skip_train=False, save="run/checkpoints", tensorboard_dir=None)
    kept.keep(args, RUN)
    kept.keep(Namespace(**{**vars(args), "rank": 1, "save": "other"}), RUN)
    kept.keep(Namespace(**{**vars(args), "skip_train": True, "save": "other"}), RUN)
    assert not (tmp_path / "other").exists()
    monkeypatch.chdir("/")
    save = ["--save", str(tmp_path / "ckpt")]
    first = ["--attention", "lighthouse", *save, "--load", str(tmp_path / "begin")]
    texts = ["--text-data", str(tmp_path / "a.txt"), "b.txt"]
    spread = ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    go_on, own = ["--load", str(tmp_path / "ckpt")], ["--lr", "2"]
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert kept.resumed(["--run-folder", str(folder), *own]) == [*first, *texts, *spread, "--lr", "-1", *go_on, *own]
        assert of_one_sequence([*own, f"--run-folder={folder}"]) == [*first, *texts, "--lr", "-1", *go_on, *own]
    assert kept.resumed(own) == of_one_sequence(own) == own


def test_switches_are_left_out_for_an_attention_that_has_none(tmp_path: Path) -> None:
    """As for stage 2 in a job of its own. What the command line itself gives stays, and is refused."""
    switches = ["--lighthouse-dense-warmup-iters", "400", "--lighthouse-stage2-at=900"]
    spread = ["--lighthouse-dense-warmup-iters", "400", "--lighthouse-stage2-at", "900"]

    def resumed(kept_words: list[str], *own: str) -> list[str]:
        (tmp_path / kept.NAME).write_text(json.dumps({"arguments": kept_words}))
        return kept.resumed(["--run-folder", str(tmp_path), *own])

    run = ["--attention", "lighthouse", *switches, "--seed", "3"]
    for name, variant in VARIANTS.items():
        first = ["--attention", "lighthouse", *(spread if variant.switches else []), "--seed", "3"]
        assert resumed(run, "--attention", name) == [*first, "--attention", name]
    assert resumed(run, "--lr", "1") == ["--attention", "lighthouse", *spread, "--seed", "3", "--lr", "1"]
    own = ["--attention=dense", "--lighthouse-stage2-at", "900"]
    assert resumed(run, *own) == ["--attention", "lighthouse", "--seed", "3", *own]
    by_spec = ["--spec", "module", "lighthouse", *spread]  # whose layers switch, whatever the name
    assert resumed(by_spec, "--attention", "dense") == [*by_spec, "--attention", "dense"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--run-folder", "FOLDER"], "has no arguments.json"),
        (["--run-folder", "FOLDER", "--lr", "1", "--run-folder", "FOLDER"], "give one folder"),
        (["--run-folder", "--lr", "1"], "give one folder"),
        (["--run", "FOLDER"], "--run is not a flag here, .*: use --run-folder"),
        (["--run-folder", "BROKEN"], "arguments.json cannot be read"),
    ],
)
def test_a_folder_without_arguments_is_refused(words: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / kept.NAME).write_text('{"arguments": ["--lr"')
    places = {"FOLDER": str(tmp_path), "BROKEN": str(tmp_path / "broken")}
    with pytest.raises(ValueError, match=says):
        kept.resumed([places.get(word, word) for word in words])


def test_a_dense_run_of_other_data_or_model_is_not_compared(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    facts = {"seq_length": "256", "seed": "1", "text_data": "['/a/train']", "num_layers": "4", "num_experts": "None"}
    others = {
        "same": {"text_data": "['/elsewhere/train']"},
        "other": {"seed": "2", "num_layers": "6"},
        "experts": {"num_experts": "8"},
        "silent": {"seed": ""},
    }
    for name, changes in {"ours": {}, **others}.items():
        with SummaryWriter(str(tmp_path / name)) as log:
            for key, value in {**facts, **changes}.items():
                if value:
                    log.add_text(key, value)
    ours = [tmp_path / "ours"]
    check_comparable(ours, [])
    check_comparable(ours, [tmp_path / "same"])
    check_comparable(ours, [tmp_path / "silent"])
    with pytest.raises(ValueError, match=r"(?s)--dense .*other cannot be compared.*--seed 2, of the run 1.*--num-layers 6"):
        check_comparable(ours, [tmp_path / "other"])
    with pytest.raises(ValueError, match="--num-experts 8, of the run None"):
        check_comparable(ours, [tmp_path / "experts"])


def test_of_a_long_list_of_files_little_is_shown(tmp_path: Path) -> None:
    """The files of Python's library fill ten thousand characters. What is shown is where they differ."""
    from torch.utils.tensorboard import SummaryWriter

    files = [f"/usr/lib/python/{number}.py" for number in range(200)]
    for name, texts in (("ours", files), ("dense", [*files[:100], "/x/own.txt", *files[100:]])):
        with SummaryWriter(str(tmp_path / name)) as log:
            log.add_text("text_data", str(texts))
    with pytest.raises(ValueError, match="cannot be compared") as refused:
        check_comparable([tmp_path / "ours"], [tmp_path / "dense"])
    shown = "--text-data … '/x/own.txt', '/usr/lib/python/100.py', '/usr/lib/python/101.py', … (201 in all), of the run "
    assert shown + "… '/usr/lib/python/100.py'" in str(refused.value)
    assert len(str(refused.value)) < 600
    (line,) = begun._words(["--text-data", *files], ["--text-data", *files[:-1]])
    assert line == f"--text-data … {files[-1]} (200 in all), there … (199 in all)"


@pytest.mark.usefixtures("megatron")
def test_what_decides_which_tokens_are_read_is_compared() -> None:
    """All that the datasets are made of, but where their files are and how they are read; and all of the model."""
    from megatron_lighthouse.mcore.data import datasets
    from tests.mcore.test_same_model import SHAPES

    made_of = reads(inspect.getsource(datasets._dataset_config))
    assert made_of - {*comparable.SAMPLES} == {*HOW_IT_IS_READ}
    assert {*SHAPES} - {*comparable.compared()} == {*comparable.WITH_ATTENTION}


HOW_IT_IS_READ = """
    allow_ambiguous_pad_tokens context_parallel_size create_attention_mask_in_dataloader data_cache_path data_parallel_size
    dataloader_defer_npy_index_mmap dataloader_fast_cache_load full_validation mmap_bin_files multiple_validation_sets
    num_dataset_builder_threads object_storage_cache_path per_dataset_sequences_path sequence_parallel
    tensor_model_parallel_size
""".split()
"""Or which validation."""


def test_a_folder_of_the_container_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / kept.NAME).write_text('{"arguments": ["--lr", "1e-3"]}')
    assert kept.of_run(["--run-folder", "/inside/run", "--seed", "3"], lambda _: tmp_path) == (
        ["--lr", "1e-3"],
        ["--seed", "3"],
    )


def test_what_is_logged_may_change_when_a_run_goes_on() -> None:
    for name in VARIANTS:
        assert not begun._compared(f"--{name}-telemetry-interval")
    assert begun._compared("--wall-gate-bias")
