"""Embeddings and the heads tied to them: one set of neurons, in language models as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import neq_kernels as neq
from neq_kernels.layers.ties import tied_groups
from tests.support import oracle

TOKENS = 23


def gpt2():
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


every_model = pytest.mark.parametrize("make", [gpt2, llama])


def twins(make, active):
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain))
    ours.get_input_embeddings().channels.set(active)
    return plain, ours, torch.randint(0, TOKENS, (2, 9))


def table(model):
    return model.get_input_embeddings().weight


def loss(model, x):
    return model(input_ids=x, labels=x).loss


@every_model
def test_one_set_of_neurons_for_both(make):
    plain, ours, x = twins(make, [3, 5, 22])
    embedding, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    assert embedding.weight is head.weight
    assert embedding.channels is head.channels
    for model in (plain, ours):
        loss(model, x).backward()
    mask = embedding.channels.mask.tolist()
    dense = oracle.zero_frozen(table(plain).grad, mask)
    oracle.assert_close64(table(ours).grad, dense, 1e-12)
    oracle.assert_frozen_are_zero(table(ours).grad, mask)
    for parameter, other in zip(ours.parameters(), plain.parameters(), strict=True):
        if parameter is not table(ours):
            oracle.assert_close64(parameter.grad, other.grad, 1e-12)
    norm = torch.nn.utils.get_total_norm([table(ours).grad])
    assert norm == pytest.approx(float(table(plain).grad[[3, 5, 22]].norm()))


@every_model
def test_wholly_frozen(make):
    plain, ours, x = twins(make, [])
    for model in (plain, ours):
        loss(model, x).backward()
    assert table(ours).grad is None
    for parameter, other in zip(ours.parameters(), plain.parameters(), strict=True):
        if parameter is not table(ours):
            oracle.assert_close64(parameter.grad, other.grad, 1e-12)


@every_model
def test_train_only_the_new_tokens(make):
    """The recipe: nothing but the rows of new tokens moves, in the embedding and in the head."""
    model = make()
    model.resize_token_embeddings(TOKENS + 2, mean_resizing=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)

    neq.convert(model)
    model.get_input_embeddings().channels.set([TOKENS, TOKENS + 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    neq.attach(optimizer, model)

    x = torch.randint(0, TOKENS + 2, (4, 9))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model, x)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    (name,) = moved
    assert "wte" in name or "embed_tokens" in name
    rows = (table(model) != before[name]).any(1).nonzero().flatten().tolist()
    assert rows == [TOKENS, TOKENS + 1]


@every_model
def test_a_vocabulary_that_grew_after_convert_needs_convert_again(make):
    _, model, _ = twins(make, [3])
    model.resize_token_embeddings(TOKENS + 2, mean_resizing=False)
    neq.convert(model)
    embedding = model.get_input_embeddings()
    assert embedding.channels is model.get_output_embeddings().channels
    assert len(embedding.channels) == TOKENS + 2
    embedding.channels.set([TOKENS])
    loss(model, torch.full((1, 4), TOKENS)).backward()
    assert table(model).grad.any(1).nonzero().flatten().tolist() == [TOKENS]


def test_a_tie_broken_since_is_repaired_by_convert():
    _, model, _ = twins(llama, [3])
    model.lm_head.weight = nn.Parameter(table(model).detach().clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"model\.embed_tokens and lm_head, which share no para"):
        neq.attach(optimizer, model)
    neq.convert(model)
    assert model.lm_head.channels is not model.model.embed_tokens.channels
    assert model.lm_head.channels.active.tolist() == [3]
    neq.attach(optimizer, model)


def test_layers_that_share_a_bias_share_their_neurons():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    neq.convert(model)
    assert [list(group) for group in tied_groups(model)] == [["0", "2"], ["1"]]
    assert model[0].channels is model[2].channels


def test_a_layer_between_two_brings_them_together():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].bias, model[2].weight = model[0].bias, model[1].weight
    assert [set(group) for group in tied_groups(neq.convert(model))] == [{"0", "1", "2"}]
    assert len({id(layer.channels) for layer in model}) == 1
