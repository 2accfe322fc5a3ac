"""What the script computes, written down once more: plainly, slowly and in float64.

Nothing here calls the code that it is compared with. A model is used as a function from tokens to
logits, and the forward passes read nothing but its weights.
"""

import itertools
import math

import numpy as np
import torch

BOS = 1  # <s>
NORM_EPS = float(np.finfo(np.float32).eps)


# ---- Forward passes


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS)


def rotate(x, base):
    """x (L, head_dim): pairs (i, i + half) turned by position · base^(−2i/head_dim)."""
    length, dim = x.shape
    angle = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    turned = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * np.exp(-1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def silu(x):
    return x / (1 + np.exp(-x))


def weights_of(model):
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def attention(hp, h, block, gains):
    """(L, D), before the output matrix: one head after the other; `block` maps names to weights."""
    d, heads = hp.head_dim, []
    for head in range(hp.num_heads):
        group = head * hp.num_kv_heads // hp.num_heads
        own, shared = slice(head * d, (head + 1) * d), slice(group * d, (group + 1) * d)
        q = rotate(rms(h @ block("attn.c_q.weight")[own].T), hp.rope_base) * gains[head]
        k = rotate(rms(h @ block("attn.c_k.weight")[shared].T), hp.rope_base)
        v = h @ block("attn.c_v.weight")[shared].T
        scores = q @ k.T / np.sqrt(d)
        if hp.objective == "ar":
            scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(heads, 1)


def mlp(h, block):
    return np.maximum(h @ block("mlp.fc.weight").T, 0) ** 2 @ block("mlp.proj.weight").T


def unet_logits(model, z):
    """Logits (L, V) of one sequence z (L,)."""
    hp, w = model.hp, weights_of(model)
    x = rms(w["tok_emb.weight"][z])
    furthest_right = 0 if hp.objective == "ar" else hp.neighbors
    for i in range(len(z)):
        for offset in range(-hp.neighbors, furthest_right + 1):
            if offset and 0 <= i + offset < len(z):
                x[i] += w[f"near.{offset}.weight"][z[i + offset]]
    x_emb = x
    encoder, skips = hp.num_layers // 2, []
    for i in range(hp.num_layers):

        def block(name, i=i):
            return w[f"blocks.{i}.{name}"]

        if i >= encoder and skips:
            x = x + w["skip_weights"][i - encoder] * skips.pop()
        x = block("resid_mix")[0] * x + block("resid_mix")[1] * x_emb
        mixed = attention(hp, rms(x), block, block("attn.q_gain")) @ block("attn.proj.weight").T
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
    for i in range(hp.num_layers):

        def block(name, i=i):
            return w[f"blocks.{i}.{name}"]

        def modulated(x, name, block=block):
            scale, shift = np.split(block(f"{name}.weight") @ c + block(f"{name}.bias"), 2)
            return rms(x) * (1 + scale) + shift

        h = modulated(x, "attn_mod")
        x = x + attention(hp, h, block, np.ones(hp.num_heads)) @ block("attn.proj.weight").T
        x = x + mlp(modulated(x, "mlp_mod"), block)
    return rms(x) @ w["lm_head.weight"].T


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
