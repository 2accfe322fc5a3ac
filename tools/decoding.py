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

    place: Tensor  # (new,)
    recent: Tensor  # (B, r), the last tokens before the new ones
    neighbors: Tensor  # (offsets, r + new): columns among these
    mask: Tensor | None  # (new, all) bool; None: they see all
    kept: dict[nn.Module, tuple[Tensor, Tensor]]  # keys and values (B, heads, n, head_dim)
    keep: bool  # those of the new tokens too
    rotary: tuple[Tensor, ...] = ()


class CachedAttention(nn.Module):
    """A `tm.Attention` of which the new tokens also see what was kept."""

    def __init__(self, attention: tm.Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, seen: Seen, positions: tm.Positions) -> Tensor:
        """(B, new, D) → (B, new, D), or (N, D) at the positions."""
        own = self.attention
        q = tm.rotate(tm.norm(own.heads(own.c_q(x))), *seen.rotary)
        k = tm.rotate(tm.norm(own.heads(own.c_k(x))), *seen.rotary)
        v = own.heads(own.c_v(x))
        if self in seen.kept:
            k, v = (torch.cat(pair, 2) for pair in zip(seen.kept[self], (k, v), strict=True))
        if seen.keep:
            seen.kept[self] = k, v
        if own.q_gain is not None:
            q = q * own.q_gain.to(x.dtype)[:, None, None]
        grouped = k.shape[1] < q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, enable_gqa=grouped)
        return own.proj(tm.select_positions(y.transpose(1, 2).flatten(2), positions))


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

    For `tm.reveal_surest` it is a model that has no blocks: `hidden`, `head`, `hp`.
    """

    block_size = 0

    def __init__(self, twin: tm.Model, before: Tensor):
        """Of a `cached` model; `before` (B,) is the token before each window."""
        self.twin, self.hp, self.head = twin, twin.hp, twin.head
        self.kept: dict = {}
        self.tokens = before[:, None][:, :0]
        self.first = self.append(before[:, None])  # hidden states (B, 1, D)

    def append(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, m, D) of clean tokens (B, m), which from now on are seen."""
        old, new = self.tokens.shape[1], tokens.shape[1]
        mask = torch.ones(new, old + new, dtype=torch.bool, device=tokens.device).tril(old)
        h = self._run(tokens, mask if new > 1 else None, keep=True)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        return h

    def hidden(self, z: Tensor, positions: tm.Positions = None) -> Tensor:
        """Hidden states (B, m, D) of a noisy block (B, m), or (N, D) at flat positions."""
        return self._run(z, None, keep=False, positions=positions)

    @torch.no_grad()
    def _run(
        self, z: Tensor, mask: Tensor | None, keep: bool, positions: tm.Positions = None
    ) -> Tensor:
        old, new = self.tokens.shape[1], z.shape[1]
        recent = self.tokens[:, max(old - self.hp.neighbors, 0) :]
        column = torch.arange(recent.shape[1] + new, device=z.device)
        last = column if keep else column[-1]  # clean tokens have neighbours on their left alone
        wanted = tm.neighbor_places(self.hp, column)
        neighbors = torch.where((wanted >= 0) & (wanted <= last), wanted, -1)
        place = torch.arange(old, old + new, device=z.device)
        seen = Seen(place, recent, neighbors, mask, self.kept, keep)
        return self.twin.hidden(z, None, positions, seen)


def reveal_causally(twin: tm.Model, z: Tensor, before: Tensor) -> Steps:
    """Position after position of z (B, L), into which the caller writes the tokens."""
    past = Past(twin, before)
    h = past.first
    for done in range(z.shape[1]):
        if done:
            h = past.append(z[:, done - 1 : done])
        logp = twin.head(h).log_softmax(-1).detach()
        yield torch.full_like(z[:, :1], done), logp


def reveal_blocks(
    twin: tm.Model, z: Tensor, before: Tensor, begin: Callable[[Past, Tensor, slice], Steps]
) -> Steps:
    """Block after block of z (B, L), each as begin(past, z of the block, its columns) says."""
    past = Past(twin, before)
    for start in range(0, z.shape[1], twin.block_size):
        columns = slice(start, min(start + twin.block_size, z.shape[1]))
        for positions, logp in begin(past, z[:, columns], columns):
            yield start + positions, logp
        if columns.stop < z.shape[1]:
            past.append(z[:, columns])
