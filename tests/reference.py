"""What the script computes, written down once more: plainly, slowly and in float64.

Nothing here calls the code that it is compared with. A model is used as a function from tokens to
logits, and the forward passes read nothing but its weights.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

BOS = 1  # <s>
NORM_EPS = float(np.finfo(np.float32).eps)


# ---- Forward passes


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS)


class Row(NamedTuple):
    """Where the tokens of an input are in the text, and which of them each one sees."""

    places: np.ndarray  # (L,)
    sees: np.ndarray  # (L, L) bool


def row_of(hp, length):
    """Tokens that follow one another and see all, or, of a causal model, those to the left."""
    sees = np.tri(length) if hp.objective == "ar" else np.ones((length, length))
    return Row(np.arange(length), sees.astype(bool))


def halves(length, block):
    """What a step of a block model sees: of each block the token before it and its own, noisy, then
    clean x_0 … x_{L−1}. Each predicts the token after it.

    A noisy token sees those of its block and the clean ones before them; a clean one sees itself
    and the clean ones before it.
    """
    starts = range(0, length, block)
    columns = [(start, place) for start in starts for place in range(start, start + block + 1)]
    columns += [("clean", place) for place in range(length)]
    sees = np.zeros((len(columns), len(columns)), bool)
    for i, (part, place) in enumerate(columns):
        for j, (other_part, other) in enumerate(columns):
            if other_part == "clean":
                sees[i, j] = other <= place if part == "clean" else other < part
            else:
                sees[i, j] = part == other_part
    return Row(np.array([place for _, place in columns]), sees)


def rotate(x, places, base):
    """x (L, head_dim): pairs (i, i + half) turned by place · base^(−2i/head_dim)."""
    dim = x.shape[1]
    angle = places[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    turned = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * np.exp(-1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def silu(x):
    return x / (1 + np.exp(-x))


def weights_of(model):
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def attention(hp, h, row, block, gains):
    """(L, D), before the output matrix: one head after the other; `block` maps names to weights."""
    d, heads = hp.head_dim, []
    for head in range(hp.num_heads):
        group = head * hp.num_kv_heads // hp.num_heads
        own, shared = slice(head * d, (head + 1) * d), slice(group * d, (group + 1) * d)
        q = rotate(rms(h @ block("attn.c_q.weight")[own].T), row.places, hp.rope_base)
        k = rotate(rms(h @ block("attn.c_k.weight")[shared].T), row.places, hp.rope_base)
        v = h @ block("attn.c_v.weight")[shared].T
        scores = np.where(row.sees, gains[head] * q @ k.T / np.sqrt(d), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(heads, 1)


def mlp(h, block):
    return np.maximum(h @ block("mlp.fc.weight").T, 0) ** 2 @ block("mlp.proj.weight").T


def unet_logits(model, z, row=None):
    """Logits (L, V) of one sequence z (L,). Neighbours are those that a token sees."""
    hp, w = model.hp, weights_of(model)
    row = row or row_of(hp, len(z))
    x = rms(w["tok_emb.weight"][z])
    for i, j in zip(*np.nonzero(row.sees), strict=True):
        offset = row.places[j] - row.places[i]
        if 0 < abs(offset) <= hp.neighbors:
            n = hp.neighbor_offsets.index(offset)
            columns = slice(n * hp.neighbor_dim, (n + 1) * hp.neighbor_dim)
            embedding = w["near.weight"][n * hp.embedding_rows + z[j]]
            x[i] += w["near_proj.weight"][:, columns] @ embedding
    x_emb = x
    encoder, skips = hp.num_layers // 2, []
    for i in range(hp.num_layers):

        def block(name, i=i):
            return w[f"blocks.{i}.{name}"]

        if i >= encoder and skips:
            x = x + w["skip_weights"][i - encoder] * skips.pop()
        x = block("resid_mix")[0] * x + block("resid_mix")[1] * x_emb
        mixed = attention(hp, rms(x), row, block, block("attn.q_gain"))
        mixed = mixed @ block("attn.proj.weight").T
        x = x + block("attn_scale") * mixed
        x = x + block("mlp_scale") * mlp(rms(x), block)
        if i < encoder:
            skips.append(x)
    tied = w["tok_emb.weight"][: hp.vocab_size]
    logits = rms(x) @ (tied if hp.tie_embeddings else w["lm_head.weight"]).T
    cap = hp.logit_softcap
    return cap * np.tanh(logits / cap) if cap else logits


def dit_logits(model, z, masked_fraction):
    """Logits (L, V) of one sequence z (L,) by PR 1106's stack."""
    hp, w = model.hp, weights_of(model)
    sigma = -np.log(1 - masked_fraction)
    angle = sigma * np.exp(-np.log(10_000) * np.arange(64) / 64)
    c = np.concatenate([np.sin(angle), np.cos(angle)])
    c = silu(w["time_embed.0.weight"] @ c + w["time_embed.0.bias"])
    c = silu(w["time_embed.2.weight"] @ c + w["time_embed.2.bias"])
    x = w["tok_emb.weight"][z]
    row = row_of(hp, len(z))
    for i in range(hp.num_layers):

        def block(name, i=i):
            return w[f"blocks.{i}.{name}"]

        def modulated(x, name, block=block):
            scale, shift = np.split(block(f"{name}.weight") @ c + block(f"{name}.bias"), 2)
            return rms(x) * (1 + scale) + shift

        h = modulated(x, "attn_mod")
        x = x + attention(hp, h, row, block, np.ones(hp.num_heads)) @ block("attn.proj.weight").T
        x = x + mlp(modulated(x, "mlp_mod"), block)
    return rms(x) @ w["lm_head.weight"].T


def block_logits(model, past, block):
    """Logits (b, V) of a noisy block (b,) after clean tokens past (n,), which see only their past:
    block diffusion as it is defined. The last of the past belongs to the block, and each token of
    it predicts the next."""
    n, length = len(past), len(past) + len(block)
    sees = np.tri(length, dtype=bool)
    sees[n - 1 :] = True
    return unet_logits(model, np.array([*past, *block]), Row(np.arange(length), sees))[n - 1 : -1]


# ---- Code lengths of small models, enumerated


def all_sequences(vocab_size, length):
    """(V^L, L) int64: every sequence."""
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def all_masks(length):
    """Every mask (L,) of at least one position."""
    masks = itertools.product([False, True], repeat=length)
    return [torch.tensor(mask) for mask in masks if any(mask)]


def free_of(model, x0):
    """(B, L) bool: what may be masked; with ANCHOR_BOS not <s>."""
    return x0 != BOS if model.hp.anchor_bos else torch.ones_like(x0, dtype=torch.bool)


@torch.no_grad()
def token_nll(model, x0, mask):
    """(B, L) float64 −ln p(x_i | visible) of every position, straight from the model's logits."""
    logits = model(torch.where(mask, model.hp.mask_id, x0)).double()
    return -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]


def masked_sum(model, x0, mask):
    """(B,) Σ of `token_nll` over the masked positions."""
    return (token_nll(model, x0, mask) * mask).sum(1)


def enumerated_nelbo(model, x0):
    """(B,) mean over k = 1 … n and over the masks of k of a row's n free tokens of (n/k)·Σ nll."""
    free = free_of(model, x0)
    n = free.sum(1)
    nats = torch.zeros(len(x0), dtype=torch.float64)
    for mask in all_masks(x0.shape[1]):
        k = int(mask.sum())
        fits = (free | ~mask).all(1)
        masks_of_k = torch.tensor([math.comb(int(count), k) for count in n]).clamp(min=1)
        nats += torch.where(fits, masked_sum(model, x0, free & mask) / k / masks_of_k, 0)
    return nats


def enumerated_tstep(model, x0, steps, eps=1e-3):
    """(B,) the T-step bound with α_i = 1 − (1 − ε)·i/T, every mask with its probability."""
    free = free_of(model, x0)
    n = free.sum(1)
    nats = eps * n.double() * math.log(model.hp.vocab_size)
    alpha = [1 - (1 - eps) * i / steps for i in range(steps + 1)]
    for mask in all_masks(x0.shape[1]):
        fits = (free | ~mask).all(1)
        k = int(mask.sum())
        nll = torch.where(fits, masked_sum(model, x0, free & mask), 0)
        for i in range(1, steps + 1):
            weight = (alpha[i - 1] - alpha[i]) / (1 - alpha[i])
            nats += weight * (1 - alpha[i]) ** k * alpha[i] ** (n - k) * nll
    return nats


def one_by_one(model, x0, order):
    """(B, L) the chain rule as it is defined: one position after the other."""
    nats = torch.zeros(x0.shape, dtype=torch.float64)
    mask = free_of(model, x0)
    for i in order:
        nats[:, i] = token_nll(model, x0, mask)[:, i] * mask[:, i]
        mask[:, i] = False
    return nats


class BlockCode:
    """The code of one window, the token before it first, block after block; float64."""

    def __init__(self, model, window, size):
        self.model, self.window, self.size = model, [int(token) for token in window], size
        self.starts = range(1, len(window), size)
        self.nats = functools.cache(self._nats)

    def _nats(self, start, mask):
        """Of every token of the block that begins at `start`, with these of them masked."""
        block = self.window[start : start + self.size]
        mask_id = self.model.hp.mask_id
        z = [mask_id if hidden else x for hidden, x in zip(mask, block, strict=True)]
        logits = block_logits(self.model, self.window[:start], z)
        total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return total - logits[np.arange(self.size), block]

    def in_order(self, place, group=1):
        """(L,): in each block the tokens with the smallest `place` first, `group` by one call."""
        found = []
        for start in self.starts:
            order = sorted(range(self.size), key=lambda i: place[start - 1 + i])
            nats = [0.0] * self.size
            for done in range(0, self.size, group):
                mask = tuple(i in order[done:] for i in range(self.size))
                for i in order[done : done + group]:
                    nats[i] = float(self.nats(start, mask)[i])
            found += nats
        return found

    def mean_of_all_orders(self):
        """Mean code length over all orders of the tokens of every block."""
        orders = list(itertools.permutations(range(self.size)))
        blocks = len(self.starts)
        return sum(sum(self.in_order(order * blocks)) for order in orders) / len(orders)


def surest_first(model, x):
    """(L,) nats of x (L,) without anchors: the surest position first, of equal ones the left."""
    mask = torch.ones(len(x), dtype=torch.bool)
    nats = torch.zeros(len(x))
    while mask.any():
        logits = model(torch.where(mask, model.hp.mask_id, x)[None])[0].detach()
        logp = logits.log_softmax(-1)
        sure = logp.amax(-1).masked_fill(~mask, -math.inf)
        surest = int((sure > sure.max() - 1e-5).int().argmax())
        nats[surest] = -logp[surest, x[surest]]
        mask[surest] = False
    return nats


def total_probability(nats):
    """Of all sequences with code lengths nats (sequences, L): 1 for a code without waste."""
    return torch.exp(-nats.double().sum(1)).sum().item()


# ---- Documents and weights


def chunks_of(tokens, length):
    """What a reader of the format would do: split before every <s>, then cut from the left."""
    documents, chunks = [], []
    for token in tokens:
        if token == BOS or not documents:
            documents.append([])
        documents[-1].append(token)
    for document in documents:
        starts = range(0, len(document), length)
        chunks += [tuple(document[start : start + length]) for start in starts]
    return chunks


def nearest_code(x, quantizer):
    """As a float, of a grid of whole numbers or of one of PyTorch's number formats."""
    x = x.clamp(-quantizer.largest, quantizer.largest)
    return x.round() if quantizer.dtype == torch.int8 else x.to(quantizer.dtype).float()


def stored_weights(tensor, quantizer, clip=0.0):
    """The grid of (R, C) weights, with the best of the 40 scales that are tried for each row."""
    if not quantizer.scale:
        return nearest_code(tensor, quantizer)
    reach = clip * tensor.square().mean(1).sqrt() if clip else tensor.abs().amax(1)
    options = []
    for n in range(1 if clip else 40):
        scale = 0.96**n * reach / quantizer.largest
        scale = scale.to(quantizer.scale).float()[:, None]
        options.append(nearest_code(tensor / scale, quantizer) * scale)
    options = torch.stack(options)
    best = (options.double() - tensor).square().sum(2).argmin(0)
    return options[best, torch.arange(len(tensor))]
