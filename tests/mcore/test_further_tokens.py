"""Multi-token prediction over packed documents: every document is as if it were alone, and predicts none of another."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.sequence.documents import Documents
from tests.mcore.test_latent import latent
from tests.mcore.test_spec import N, local_spec, transformer_config
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("megatron")

ROW, END = (60, 1, 2, 3, 40, N - 106), 63
"""Lengths of the documents of a row, the last of which the row's end cuts; what the others end with."""


def row() -> tuple[Documents, Tensor, Tensor, Tensor]:
    """The documents, tokens, labels and loss mask of a row: [1, N] each."""
    bounds = [0, *accumulate(ROW)]
    tokens = torch.randint(0, END, (1, N + 1), generator=torch.Generator().manual_seed(2))
    tokens[0, torch.tensor(bounds[1:-1]) - 1] = END
    documents = Documents.of(torch.tensor(bounds, dtype=torch.int32), N)
    return documents, tokens[:, :-1], tokens[:, 1:], torch.ones(1, N)


def test_what_is_rolled_stays_in_its_document() -> None:
    from megatron_lighthouse.mcore.attention.packed import packed
    from megatron_lighthouse.mcore.loop.further_tokens import ends_of, roll

    documents, tokens, labels, mask = row()
    twice = [torch.cat([x, x]) for x in (tokens, labels, mask)]
    both = Documents.of(torch.cat([documents.cu_seqlens, documents.cu_seqlens[1:] + N]), 2 * N)
    given = {"packed_seq_params": packed(both, N, ends_of(both, twice[0], END))}
    for depth in (1, 2):
        twice = [roll(pytest.fail, x, **given)[0] for x in twice]
        rolled_labels, rolled_mask = twice[1][1], twice[2][1]
        counted = [depth + position + 1 < length for length in ROW[:-1] for position in range(length)]
        counted += [position + depth < ROW[-1] for position in range(ROW[-1])]  # its label goes on after the row's end
        assert rolled_mask.tolist() == counted
        at = torch.tensor(counted).nonzero().squeeze(1)
        assert torch.equal(rolled_labels[at], labels[0, at + depth])
        assert torch.equal(twice[0][1, at], tokens[0, at + depth])
        assert torch.equal(twice[2][0], twice[2][1])
    assert roll(lambda *given: given, mask, -1, -1, None, None) == (mask, -1, -1, None, None)


def model(monkeypatch: pytest.MonkeyPatch, is_latent: bool = False) -> Any:
    """That predicts one further token, built and called as in training, with no hook that stays; by MLA or not."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import multi_token_prediction
    from megatron.training.models import gpt as builder

    from megatron_lighthouse.mcore.attention import layer_specs
    from megatron_lighthouse.mcore.loop import further_tokens

    roll = getattr(multi_token_prediction.roll_tensor, "__wrapped__", multi_token_prediction.roll_tensor)
    monkeypatch.setattr(multi_token_prediction, "roll_tensor", partial(further_tokens.roll, roll))
    monkeypatch.setattr(further_tokens, "global_args", lambda: Namespace(dataloader_inter_document_masking=True))
    further = {"num_layers": 2, "mtp_num_layers": 1, "mtp_loss_scaling_factor": 1.0, "transformer_impl": "local"}
    config = latent(**further).transformer if is_latent else transformer_config(**further)
    spec = layer_specs._with_documents(local_spec(multi_latent_attention=is_latent), config)
    inner = getattr(builder.mtp_block_spec, "__wrapped__", builder.mtp_block_spec)
    mtp = further_tokens.block_spec(inner, SimpleNamespace(transformer=config), spec)
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "max_sequence_length": N, "position_embedding_type": "rope"}
    return GPTModel(config, spec, **sizes, mtp_block_spec=mtp).double().eval()


def gradients(one: Any, tokens: Tensor, labels: Tensor, mask: Tensor, **named: Any) -> list[Tensor]:
    """Of the loss of further tokens alone."""
    losses = one(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None, labels=labels, loss_mask=mask, **named)
    found = torch.autograd.grad((losses * 0).sum(), [*one.parameters()], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(one.parameters(), found, strict=True)]


@pytest.mark.parametrize("is_latent", [False, True], ids=["GQA", "MLA"])
def test_a_row_of_documents_trains_as_each_document_alone(monkeypatch: pytest.MonkeyPatch, is_latent: bool) -> None:
    from megatron_lighthouse.mcore.attention.document_rotary import rotate_by
    from megatron_lighthouse.mcore.attention.packed import packed
    from megatron_lighthouse.mcore.loop.further_tokens import ends_of

    documents, tokens, labels, mask = row()
    one = model(monkeypatch, is_latent)
    expected, counted = [torch.zeros_like(p) for p in one.parameters()], 0
    for i, parts in enumerate(zip(*(x.split(ROW, dim=1) for x in (tokens, labels, mask)), strict=True)):
        own, own_labels, own_mask = parts[0], parts[1], parts[2].clone()
        own_mask[:, -1] = i == len(ROW) - 1
        count = int(own_mask[:, 1:].sum())
        counted += count
        for total, grad in zip(expected, gradients(one, own, own_labels, own_mask), strict=True):
            total += count * grad
    rotate_by(one, documents.positions.unsqueeze(0))
    within = packed(documents, N, ends_of(documents, tokens, END), documents.positions.unsqueeze(0))
    found = gradients(one, tokens, labels, mask, packed_seq_params=within)
    assert any(grad.abs().max() > 1e-3 for name, grad in zip(dict(one.named_parameters()), found, strict=True) if "mtp" in name)
    for grad, total in zip(found, expected, strict=True):
        assert_close(grad, total / counted, "float32")


def test_a_model_that_predicts_further_tokens_is_evaluated_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lighthouse.recipe.readers import BYTES
    from megatron_lighthouse.recipe.trained import Trained

    _, tokens, labels, _ = row()
    read, one = torch.cat([tokens[0], labels[0, -1:]]).numpy(), model(monkeypatch)
    trained = Trained(Namespace(dataloader_inter_document_masking=True), 0, one, replace(BYTES, end=END))
    losses, bounds = trained.token_losses(read), [0, *accumulate(ROW)]
    last = trained.next_token(read[:-1])
    for start, stop in pairwise(bounds):
        assert_close(losses[start:stop], trained.token_losses(read[start : stop + 1]), "float32")
    assert_close(last, trained.next_token(read[bounds[-2] : -1]), "float32")
