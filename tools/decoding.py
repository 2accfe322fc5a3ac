"""Predictions one after the other, as a decoder needs them: of a causal model, or block by block.

What a clean token sees never changes, so its keys and values are computed once and kept: a call for
a token, or for a block, runs through the model with these alone. The predictions are those of
`tm.causal_nll` and `tm.ordered_nll`, up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import common  # noqa: F401 (it says where train_mdlm.py is)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_mdlm as tm

Steps = Iterator[tuple[Tensor, Tensor]]  # positions (B, g), and log-probabilities (B, g, V)


class Seen(NamedTuple):
    """A `tm.View` of new tokens, with what was kept of those before them."""

    rotary: tuple[Tensor, Tensor]  # of the new tokens
    recent: Tensor  # (B, r), the last tokens before the new ones
    neighbors: Tensor  # (offsets, r + new): columns among these
    mask: Tensor | None  # (new, all) bool; None: they see all
    kept: dict[nn.Module, Tensor]  # keys and values (2, B, heads, room, head_dim)
    room: int  # for the tokens of a window, and the one before it
    columns: slice  # of the new tokens in it


class CachedAttention(nn.Module):
    """A `tm.Attention` of which the new tokens also see what was kept. Their own keys and values
    are written behind that; whether they stay there is up to `Past`."""

    def __init__(self, attention: tm.Attention):
        super().__init__()
        self.attention = attention

    def forward(
        self, x: Tensor, seen: Seen, positions: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """(B, new, D) → (B, new, D), or (N, D) at the positions, as many in every row."""
        own, mask, rotary = self.attention, seen.mask, seen.rotary
        new = x.shape[1]
        k, v = own.c_k(x, own.c_v).unflatten(-1, (2, -1, own.head_dim)).unbind(2)
        k, v = tm.rotate(tm.norm(k), *rotary).transpose(1, 2), v.transpose(1, 2)
        if self not in seen.kept:
            seen.kept[self] = k.new_empty(2, *k.shape[:2], seen.room, own.head_dim)
        kept = seen.kept[self]
        kept[0, :, :, seen.columns], kept[1, :, :, seen.columns] = k, v
        k, v = kept[:, :, :, : seen.columns.stop]
        if positions is not None:
            x = tm.select_positions(x, positions).unflatten(0, (len(x), -1))
            column = (positions % new).view(x.shape[:2])
            rotary = [table[column] for table in rotary]
            mask = None if mask is None else mask[column]
        q = tm.rotate(tm.norm(own.c_q(x).unflatten(-1, (-1, own.head_dim))), *rotary)
        if own.q_gain is not None:
            q = q * own.q_gain.to(x.dtype)[:, None]
        q = q.transpose(1, 2)
        heads, asked = k.shape[1], q.shape[2]
        q = q.unflatten(1, (heads, -1)).flatten(2, 3)  # a group's queries as one head's: faster
        if mask is not None:
            mask = torch.cat([mask] * (q.shape[2] // asked), -2)
            mask = mask if mask.dim() == 2 else mask[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.unflatten(2, (-1, asked)).flatten(1, 2)
        y = own.proj(y.transpose(1, 2).flatten(2), scale=scale)
        return y if positions is None else y.flatten(0, 1)


def embed(twin: tm.Model, z: Tensor, seen: Seen) -> Tensor:
    """(B, new, D): embeddings of new tokens z and of their neighbours, also recent ones."""
    row = torch.cat([seen.recent, z], dim=1)
    return type(twin).embed(twin, row, seen)[:, seen.recent.shape[1] :]


def cached(model: tm.Model) -> tm.Model:
    """A model with the same weights, in the same memory, whose attention is `CachedAttention`."""
    twin = tm.outline_model(model.hp)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.compute_dtype, twin.block_size = model.compute_dtype, model.block_size
    twin.embed = functools.partial(embed, twin)
    for block in twin.blocks:
        block.attn = CachedAttention(block.attn)
    return twin.eval()


class Past:
    """Clean tokens, the same number in all rows; a noisy block can be looked at after them.

    `tm.reveal_surest` can take it for a model: it has `head` and `hp` too.
    """

    def __init__(self, twin: tm.Model, before: Tensor, length: int):
        """Of a `cached` model; `before` (B,) is the token before each window of that length."""
        self.twin, self.hp, self.head = twin, twin.hp, twin.head
        self.kept: dict = {}
        self.room = 1 + length
        self.tokens = before[:, None]
        self.old = 0  # so many of the tokens are kept, those behind them join the next call

    def append(self, tokens: Tensor) -> None:
        """Clean tokens (B, m), which from now on are seen."""
        self.tokens = torch.cat([self.tokens, tokens], dim=1)

    def next_hidden(self) -> Tensor:
        """Hidden states (B, D) at the last of the clean tokens: what predicts the next one."""
        new = self.tokens.shape[1] - self.old
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return self._run(self.tokens, self.tokens[:, :0], (rows + 1) * new - 1)

    def hidden(self, z: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (N, D) that predict the flat positions of a noisy block z (B, m), as many
        in every row. The last clean token belongs to the block: it predicts the first one."""
        clean, last = self.tokens[:, :-1], self.tokens[:, -1:]
        new = clean.shape[1] - min(self.old, clean.shape[1])
        rows = positions // z.shape[1]
        return self._run(clean, torch.cat([last, z], dim=1), positions + rows + (rows + 1) * new)

    @torch.no_grad()
    def _run(self, clean: Tensor, noisy: Tensor, positions: Tensor) -> Tensor:
        """Of the clean tokens that are not kept yet, and a noisy block behind them."""
        all_clean, device = clean.shape[1], clean.device
        old, total = min(self.old, all_clean), all_clean + noisy.shape[1]
        first = max(old - self.hp.neighbors, 0)
        place = torch.arange(first, total, device=device)
        last = torch.where(place < all_clean, place, total - 1)  # that each token sees
        wanted = tm.neighbor_places(self.hp, place)
        neighbors = torch.where((wanted >= first) & (wanted <= last), wanted - first, -1)
        mask = None
        if all_clean - old > 1 or (old < all_clean < total):
            mask = torch.arange(total, device=device) <= last[old - first :, None]
        new = torch.cat([clean[:, old:], noisy], dim=1)
        recent = clean[:, first:old]
        columns = slice(old, total)
        rotary = tm.rotary_table(self.hp, place[old - first :])
        seen = Seen(rotary, recent, neighbors, mask, self.kept, self.room, columns)
        self.old = all_clean
        return self.twin.hidden(new, None, positions, seen)


@torch.no_grad()  # with gradients, CPUs may round: see tm.multiply
def reveal_causally(twin: tm.Model, z: Tensor, before: Tensor) -> Steps:
    """Position after position of z (B, L), into which the caller writes the tokens."""
    past = Past(twin, before, z.shape[1])
    for done in range(z.shape[1]):
        logp = twin.head(past.next_hidden()).log_softmax(-1)
        yield torch.full_like(z[:, :1], done), logp[:, None]
        past.append(z[:, done : done + 1])


def reveal_blocks(
    twin: tm.Model, z: Tensor, before: Tensor, begin: Callable[[Past, Tensor, slice], Steps]
) -> Steps:
    """Block after block of z (B, L), each as begin(past, z of the block, its columns) says."""
    past = Past(twin, before, z.shape[1])
    for start in range(0, z.shape[1], twin.block_size):
        columns = slice(start, min(start + twin.block_size, z.shape[1]))
        for positions, logp in begin(past, z[:, columns], columns):
            yield start + positions, logp
        past.append(z[:, columns])
