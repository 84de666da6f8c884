"""Conversations (`--sft`): the rows of Megatron's dataset, each conversation as if alone, at any layout as on one process."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from megatron_lighthouse.launch.check import parse
from megatron_lighthouse.mcore.command_line import conversations
from megatron_lighthouse.mcore.command_line.documents import mask_problem
from megatron_lighthouse.mcore.data.conversation_files import Conversations, problem
from megatron_lighthouse.mcore.data.files import problems
from megatron_lighthouse.plots import read_scalars
from tests.mcore import harness
from tests.mcore.harness import Run, some_slow
from tests.mcore.test_documents import MODEL_OF_DOCUMENTS
from tests.mcore.test_parity import START, assert_same
from tests.tolerances import assert_close

WORDS = "the a of model document row token window long short see sees holds no other one two next to and".split()
PADDED = ("--padded-vocab-size", "64")
run = partial(harness.run, model=MODEL_OF_DOCUMENTS)
SFT = "--sft --sft-tokenizer-prompt-format default --tokenizer-type SFTTokenizer --lr 1e-3".split()
TOKENIZER = ["--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model"]
LIGHTHOUSE = ["--attention", "lighthouse", "--lighthouse-tile-budget", "2"]
DENSE = ["--attention", "dense"]
LAYOUTS = {
    "two rows at once": (1, "--micro-batch-size 2"),
    "CP2, all-gather and all-to-all by layer": (2, "--context-parallel-size 2 --cp-comm-type p2p all_gather a2a p2p"),
    "TP2+SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2, loss in tiles": (2, "--loss-tile-tokens 48"),
}
"""DP2 counts unequal numbers of tokens, and pads unequally."""


def said(lengths: list[int], seed: int) -> list[dict[str, str]]:
    """Conversations of so many words, each begun by a message of the system."""
    draw = numpy.random.default_rng(seed)
    messages = []
    for length in lengths:
        text = [" ".join(draw.choice(WORDS, n)) for n in (1, length // 2, length - length // 2)]
        messages += [{"role": role, "content": t} for role, t in zip(("system", "user", "assistant"), text, strict=True)]
    return messages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows that end with padding, that hold one conversation and a part of the next, and that are cut."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("conversations")
    known = ["<unk>", "<pad>", "<s>", "</s>", "system", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %} {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, "chat_template": template}))
    rows = [[60, 2, 90, 31], [200], [3, 5, 2, 7], [150, 140], [90, 10, 100, 20], [10, 200], [40], [2, 33, 120]]
    lines = [json.dumps({"messages": said(lengths, i)}) for i, lengths in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    paths = [str(folder / "rows.jsonl")]
    return ["--train-data-path", *paths, "--valid-data-path", *paths, "--tokenizer-model", str(folder), *PADDED]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save = ["--train-iters", "1", "--save", str(folder / "checkpoint"), "--save-interval", "1"]
    run(folder, *SFT, *DENSE, *save, data=data)
    return folder / "checkpoint"


VALIDATED = "--eval-interval 3 --eval-iters 2".split()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, data: list[str]) -> Run:
    folder = tmp_path_factory.mktemp("one")
    return run(folder, *SFT, *LIGHTHOUSE, *VALIDATED, "--load", str(checkpoint), *START, data=data)


@pytest.mark.parametrize("layout", some_slow(LAYOUTS, {"two rows at once", "TP2+SP", "PP2"}))
def test_losses_equal_those_of_one_process(
    layout: str, tmp_path: Path, checkpoint: Path, data: list[str], one_process: Run
) -> None:
    ranks, arguments = LAYOUTS[layout]
    words = [*SFT, *LIGHTHOUSE, *VALIDATED, "--load", str(checkpoint), *START, *arguments.split()]
    result = run(tmp_path, *words, ranks=ranks, data=data)
    assert_same(result, one_process)
    assert "tokens/s leaves out the padding at the ends of rows" in result.log
    for name in ("tokens a row", "lm loss validation"):
        logged, expected = (read_scalars(x.folder / "tensorboard")[name][1] for x in (result, one_process))
        assert_close([*logged], [*expected], "parallel loss")
    assert 100 < expected[0] < 256 or name != "tokens a row"


def test_dense_layers_equal_megatrons_own_over_each_conversation(
    tmp_path: Path, checkpoint: Path, data: list[str], one_process: Run
) -> None:
    """On two context-parallel ranks, where Megatron's dataset would fill each conversation up."""
    start = [*SFT, *DENSE, "--load", str(checkpoint), *START]
    one = run(tmp_path / "one", *start, data=data)
    assert abs(one.losses[1] - one_process.losses[1]) > 1e-5, "nothing was selected"
    assert_same(run(tmp_path / "two", *start, "--context-parallel-size", "2", ranks=2, data=data), one)


class Words:
    """A tokenizer of Megatron's interface: each letter a token, the padding 0."""

    pad, eod = 0, 9

    def tokenize_conversation(self, conversation: list[dict[str, str]], **how: Any) -> tuple[Any, Any]:
        tokens = numpy.array([ord(x) - 96 for message in conversation for x in message["content"]])
        target = numpy.array([ord(x) - 96 if m["role"] == "assistant" else -100 for m in conversation for x in m["content"]])
        return tokens, target


ROWS = [
    (["abc", "defg"], [3, 4], 7),
    (["abcdefgh", "ij"], [8, 2], 10),
    (["abcdefgh", "ijklmnop"], [8, 4], 12),
    (["abcdefghijkl", "m"], [12], 12),
    (["a"], [1], 1),
]


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("texts", "lengths", "real"), ROWS)
def test_rows_are_megatrons_but_for_their_padding(texts: list[str], lengths: list[int], real: int, tmp_path: Path) -> None:
    from megatron.training.datasets.sft_dataset import SFTDataset

    from megatron_lighthouse.mcore.data.conversations import ConversationDataset, real_tokens
    from megatron_lighthouse.mcore.data.documents import documents_in

    path = tmp_path / "rows.jsonl"
    messages = [{"role": role, "content": part} for text in texts for role, part in (("system", ""), ("assistant", text))]
    path.write_text("\n" + json.dumps({"messages": messages}) + "\n")
    config = Namespace(tokenizer=Words(), sequence_length=12, context_parallel_size=1, reset_position_ids=False)
    config.create_attention_mask = config.reset_attention_mask = False
    made: list[Any] = [kind.__new__(kind) for kind in (SFTDataset, ConversationDataset)]
    for dataset in made:
        vars(dataset).update(config=config, dataset=Conversations(path), indices=numpy.array([0]), num_samples=1)
    theirs, ours = (dataset[0] for dataset in made)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(theirs[name], ours[name])
    assert ours["cu_seqlens"].dtype == theirs["cu_seqlens"].dtype
    assert ours["cu_seqlens"].shape == theirs["cu_seqlens"].shape
    padding = [12 - real] if real < 12 else []
    assert documents_in(ours["cu_seqlens"].unsqueeze(0)).lengths == (*lengths, *padding)
    assert int(real_tokens(ours["labels"], 0).sum()) == real


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, ""),
        ({"tokenizer_type": "NullTokenizer"}, "--tokenizer-type NullTokenizer: use SFTTokenizer"),
        ({"eod_mask_loss": True}, "--eod-mask-loss: which tokens count .* leave the latter out"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"text_data": ["x"]}, r"--text-data: rows are conversations of JSON lines \(--data-path"),
    ],
)
def test_what_they_do_not_go_with(given: dict[str, Any], message: str) -> None:
    args = Namespace(**{"sft": True, "tokenizer_type": "SFTTokenizer", **given})
    found = [*conversations.problems(args)]
    assert len(found) == bool(message)
    assert all(re.search(f"--sft with {message}", said) for said in found)
    args.sft = False
    assert not [*conversations.problems(args)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}\n', None),
        ("\n", "is empty: give JSON lines"),
        ('\n{"messages": []}\n', "line 2: no list of messages: give"),
        ('{"text": "a"}\n', "line 1: no list of messages"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: a message without role or content"),
        ("{\n", "line 1: no JSON"),
    ],
)
def test_a_file_that_holds_none(text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    found = problem("--data-path", str(path), path, whole=True)
    assert found is None if message is None else message in str(found)
    assert "cannot be read" in str(problem("--data-path", "none", tmp_path / "none", whole=True))


def test_parts_of_a_split_without_rows_are_refused(tmp_path: Path) -> None:
    """Of which Megatron's dataset would take a number modulo 0 at the first evaluation."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 12)
    given = [*TOKENIZER, "some/model", "--data-path", str(path), "--eval-iters", "10"]
    message = f"--split 969,30,1 leaves none of the 12 rows of {path} to valid and test: use --split 11,1,0"
    (found,) = problems(parse(given), Path)
    assert message in found
    assert [*problems(parse([*given, "--split", "11,1,0"]), Path)] == []
    assert [*problems(parse(given), Path, whole=False)] == []  # the first rank says it


def test_object_storage_is_refused() -> None:
    given = [*TOKENIZER, "some/model", "--train-data-path", "msc://profile/rows.jsonl"]
    (found,) = problems(parse(given), Path)
    assert re.search(r"msc://profile/rows.jsonl is in object storage, .* copy it to a path that all nodes", found)


def test_a_mask_is_not_to_be_replaced_by_what_they_do_not_go_with() -> None:
    said = mask_problem(Namespace(sft=True, reset_attention_mask=True))
    assert str(said).endswith(": leave it out: conversations are kept apart without it.")


def test_a_validation_is_megatrons_of_pre_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.mcore.loop import validation

    args = SimpleNamespace(sft=True)
    monkeypatch.setattr(validation, "get_args", lambda: args)
    assert validation.evaluate(lambda x: (x, args.sft, conversations.asked(args)), 3) == (3, False, True)
    assert (args.sft, args.validates_conversations) == (True, False)
