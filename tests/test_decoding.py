"""tools/decoding.py: with keys and values that are kept, the predictions are the same."""

import inspect
import itertools

import codec
import decoding
import pytest
import torch
from conftest import random_model, tiny_hp

import train_mdlm as tm

SHAPE = dict(
    vocab_size=7,
    train_seq_len=12,
    train_batch_tokens=12,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
)
X0 = torch.randint(0, 7, (5, 12), generator=torch.Generator().manual_seed(0))
BEFORE = torch.tensor([1, 0, 3, 6, 2])


def revealed(steps, z):
    """(B, L) nats of the tokens of X0, which are written into z as they are revealed."""
    nats = torch.zeros(X0.shape)
    for positions, logp in steps:
        tokens = X0.gather(1, positions)
        nats.scatter_(1, positions, -logp.gather(2, tokens[..., None])[..., 0])
        z.scatter_(1, positions, tokens)
    return nats


@pytest.mark.parametrize("neighbors", [0, 1, 5])
@pytest.mark.parametrize("system", [dict(objective="ar"), dict(block_size=4)])
def test_causal_predictions(system, neighbors):
    model = random_model(tiny_hp(**SHAPE, **system, neighbors=neighbors))
    z = torch.full_like(X0, 0)
    found = revealed(decoding.reveal_causally(decoding.cached(model), z, BEFORE), z)
    expected = tm.causal_nll(model, tm.with_before(X0, BEFORE))
    assert torch.allclose(found, expected, atol=1e-5) and torch.equal(z, X0)


@pytest.mark.parametrize("neighbors", [0, 1, 5])
@pytest.mark.parametrize("block", [1, 3, 4, 12])
def test_blocks_are_predicted_as_they_are_scored(block, neighbors):
    model = random_model(tiny_hp(**SHAPE, block_size=block, neighbors=neighbors))
    twin, window = decoding.cached(model), tm.with_before(X0, BEFORE)
    keys = torch.rand(X0.shape, generator=torch.Generator().manual_seed(1))
    for group in (1, 2):

        def in_order(past, z, columns, group=group):
            order = keys[:, columns].argsort(-1)
            return codec.reveal_in_order(past, z, order, group)

        def surest(past, z, columns, group=group):
            return tm.reveal_surest(past, z, past.hidden, group)

        for begin, expected in (
            (in_order, tm.ordered_nll(model, window, keys, group)),
            (surest, tm.confidence_nll(model, window, group)),
        ):
            z = torch.full_like(X0, model.hp.mask_id)
            found = revealed(decoding.reveal_blocks(twin, z, BEFORE, begin), z)
            assert torch.allclose(found, expected, atol=1e-5) and torch.equal(z, X0)


ORDERS = (
    lambda past, z, columns: tm.reveal_surest(past, z, past.hidden),
    lambda past, z, columns: codec.reveal_in_order(past, z, z.argsort(1), 1),
)


@pytest.mark.parametrize("system", [dict(objective="ar"), dict(block_size=4)])
def test_nothing_is_rounded_where_training_rounds(system, monkeypatch):
    model = random_model(tiny_hp(**SHAPE | system | dict(model_dim=64)))
    twin = decoding.cached(model)

    def all_nats():
        yield revealed(decoding.reveal_causally(twin, X0.clone(), BEFORE), X0.clone())
        for order in ORDERS if model.block_size else ():
            z = torch.full_like(X0, model.hp.mask_id)
            yield revealed(decoding.reveal_blocks(twin, z, BEFORE, order), z)

    exact = list(all_nats())
    monkeypatch.setattr(tm, "FAST_BFLOAT16", True)
    assert all(itertools.starmap(torch.equal, zip(all_nats(), exact, strict=True)))


def test_probabilities_of_other_positions_do_not_wait_in_memory():
    """A codec has hundreds of these, each of which waits for its turn."""
    model = random_model(tiny_hp(**SHAPE))
    steps = tm.reveal_surest(model, torch.full_like(X0, model.hp.mask_id), model.hidden)
    next(steps)
    (inner,) = filter(inspect.isgenerator, inspect.getgeneratorlocals(steps).values())
    held = [x for x in inspect.getgeneratorlocals(inner).values() if isinstance(x, torch.Tensor)]
    assert max(x.numel() for x in held) < X0.numel() * SHAPE["vocab_size"]


def test_weights_are_not_copied_and_the_model_is_left_as_it_was():
    model = random_model(tiny_hp(**SHAPE, block_size=4))
    before = tm.chain_rule(model, X0)
    twin = decoding.cached(model)
    assert twin.tok_emb.weight.data_ptr() == model.tok_emb.weight.data_ptr()
    assert type(model.blocks[0].attn) is tm.Attention
    assert torch.equal(tm.chain_rule(model, X0), before)


def test_every_token_runs_through_the_model_once_and_every_block_once_a_step():
    model = random_model(tiny_hp(**SHAPE, block_size=4))
    twin, seen = decoding.cached(model), []
    twin.blocks[0].mlp.register_forward_hook(lambda module, x, y: seen.append(y.shape[1]))

    def in_order(past, z, columns):
        return codec.reveal_in_order(past, z, torch.arange(4).expand(z.shape), 1)

    z = torch.full_like(X0, model.hp.mask_id)
    revealed(decoding.reveal_blocks(twin, z, BEFORE, in_order), z)
    # A block has the token before it; what is clean now joins the next call
    assert seen == [5] * 4 + 2 * ([9] + [5] * 3)


def test_a_token_and_a_block_may_be_asked_for_in_turn():
    """The last clean token is kept after the one, and part of the block in the other."""
    model = random_model(tiny_hp(**SHAPE, block_size=4, neighbors=2))
    twin, z = decoding.cached(model), torch.full((5, 4), model.hp.mask_id)
    at, both = torch.arange(20), decoding.Past(twin, BEFORE, 12)
    for columns in (slice(0, 4), slice(4, 8)):
        token, block = (decoding.Past(twin, BEFORE, 12) for _ in range(2))
        for past in (token, block):
            past.append(X0[:, : columns.start])
        found = (both.next_hidden(), both.hidden(z, at), both.next_hidden())
        for one, other in zip(
            found, (token.next_hidden(), block.hidden(z, at), found[0]), strict=True
        ):
            assert torch.allclose(one, other, atol=1e-5)
        both.append(X0[:, columns])
