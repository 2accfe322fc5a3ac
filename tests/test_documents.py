"""Documents as chunks: against an independent reading of the shards, and in bounded memory."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import prepare_text
import pytest
import reference
import torch
from conftest import ROOT, clean_env

import train_mdlm as tm

L, V, BOS, PAD = 16, 50, 1, 51
CPU = torch.device("cpu")


def hp_of(**overrides):
    values = dict(preset="eos", vocab_size=V, train_seq_len=L, train_batch_tokens=L * 12)
    values |= dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2)
    return tm.Hyperparameters(**(values | dict(max_wallclock_seconds=0.0) | overrides))


def write_shards(folder, contents):
    for number, content in enumerate(contents):
        prepare_text.write_shard(folder / f"fineweb_train_{number:06d}.bin", np.array(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards of random documents, of 1 to 60 tokens, and their tokens; the second one begins
    inside a document, one has no <s>."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    contents = []
    for number, size in enumerate((700, 333, 5, 64, 900)):
        content = random.integers(2, V, size)
        if number != 2:
            content[random.random(size) < 0.05] = BOS
            content[0] = BOS if number != 1 else 7
        contents.append(content.tolist())
    write_shards(folder, contents)
    return folder, contents


def test_every_chunk_once_an_epoch_in_shard_after_shard(shards):
    folder, tokens = shards
    stream = tm.DocumentStream(hp_of(data_path=str(folder)))
    by_shard = [reference.chunks_of(part, L) for part in tokens]
    total, visits, orders = sum(map(len, by_shard)), [], []
    for epoch in range(3):
        rows = stream.windows(range(epoch * total, (epoch + 1) * total), L)
        assert rows.shape == (total, 1 + L) and (rows[:, 0] == PAD).all()
        rows = rows[:, 1:]
        read = [tuple(row[row != PAD].tolist()) for row in rows]
        for row, chunk in zip(rows, read, strict=True):
            assert (row[: len(chunk)] != PAD).all()
        place, visited = 0, []
        while place < total:  # every shard is read to its end before the next one
            matches = [
                number
                for number, part in enumerate(by_shard)
                if Counter(read[place : place + len(part)]) == Counter(part)
            ]
            assert len(matches) == 1 and matches[0] not in visited
            visited += matches
            place += len(by_shard[matches[0]])
        visits.append(visited)
        orders.append(read)
    assert visits[0] != visits[1] or visits[0] != visits[2]  # other shards first
    assert len(set(map(tuple, orders))) == 3
    in_order = itertools.chain(*(by_shard[number] for number in visits[0]))
    assert orders[0] != list(in_order)  # shuffled within a shard
    other = tm.DocumentStream(hp_of(seed=7, data_path=str(folder))).windows(range(total), L)
    assert not torch.equal(other, stream.windows(range(total), L))


def test_a_single_shard_has_another_order_in_every_epoch(shards, tmp_path):
    write_shards(tmp_path, shards[1][4:])
    stream, count = (
        tm.DocumentStream(hp_of(data_path=str(tmp_path))),
        len(reference.chunks_of(shards[1][4], L)),
    )
    epochs = [stream.windows(range(n * count, n * count + count), L).tolist() for n in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = tm.DocumentStream(hp_of(seed=7, data_path=str(tmp_path)))
    other = other.windows(range(count), L).tolist()
    assert other not in epochs and sorted(other) == sorted(epochs[0])


def test_a_batch_depends_on_seed_and_step_only(shards):
    """Read before, read afresh, in halves and in single rows: the same batch, across shards and
    epochs."""
    hp = hp_of(data_path=str(shards[0]))
    worn = tm.DocumentStream(hp)
    for step in (0, 3, 9, 40, 2):
        fresh = tm.DocumentStream(hp)
        whole = tm.training_batch(hp, worn, step, range(12), 12 * L, CPU)
        for size in (6, 1):
            parts = [
                tm.training_batch(hp, fresh, step, range(first, first + size), size * L, CPU)
                for first in range(0, 12, size)
            ]
            assert torch.equal(torch.cat([part.z for part in parts]), whole.z)
            shares = torch.cat([part.masked_fraction for part in parts])
            assert torch.equal(shares, whole.masked_fraction)
            weights = sum(part.weights.sum() for part in parts)
            assert weights == pytest.approx(whole.weights.sum().item(), rel=1e-5)


@pytest.mark.parametrize("masking", ["bernoulli", "count"])
def test_pad_and_anchors_are_neither_masked_nor_scored(shards, masking):
    hp = hp_of(masking=masking, loss_weight="flat", data_path=str(shards[0]))
    stream, masked = tm.DocumentStream(hp), Counter()
    for step in range(60):
        x0 = stream.windows(range(step * 12, step * 12 + 12), L)[:, 1:]
        batch = tm.training_batch(hp, stream, step, range(12), 12 * L, CPU)
        mask = batch.z == hp.mask_id
        assert torch.equal(torch.where(mask, 0, batch.z), torch.where(mask, 0, x0))
        scored = batch.weights > 0
        assert mask.sum() == scored.sum() and batch.dropped == 0
        assert batch.tokens == (x0 != PAD).sum()
        assert (batch.weights[scored] == 1).all()
        masked.update(x0[mask].tolist())
        assert torch.equal(batch.targets[scored], x0[mask])
    assert not {BOS, PAD} & masked.keys() and len(masked) > 40
    everything = torch.ones(12), torch.rand(12, L)
    mask, _, _ = tm.apply_noise(hp_of(anchor_bos=False), x0, *everything)
    assert torch.equal(mask, x0 != PAD)


def test_the_loss_of_a_uniform_model_is_the_uniform_code_of_the_free_tokens(shards):
    hp = hp_of(masking="count", loss_weight="elbo", mask_max=1.0, data_path=str(shards[0]))
    model = tm.build_model(hp)
    torch.nn.init.zeros_(model.lm_head.weight)
    stream = tm.DocumentStream(hp)
    x0 = stream.windows(range(12), L)[:, 1:]
    batch = tm.training_batch(hp, stream, 0, range(12), 12 * L, CPU)
    free = ((x0 != PAD) & (x0 != BOS)).sum()
    expected = free.item() * math.log(V)
    assert tm.batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_tokens_beyond_the_vocabulary_are_found_where_a_run_gets_first(tmp_path):
    write_shards(tmp_path, [[1, 60 if number == 2 else 3, 4] for number in range(4)])

    def stream(seed):
        return tm.DocumentStream(hp_of(seed=seed, data_path=str(tmp_path)))

    seeds = {stream(seed).order(0)[0]: seed for seed in range(40)}  # by the shard that comes first
    stream(seeds[1]).measure(V, first_tokens=3)
    with pytest.raises(tm.InputError, match="000002.bin: holds token 60"):
        stream(seeds[2]).measure(V, first_tokens=3)


PROBE = """
import json, resource, sys
import train_mdlm as tm

hp = tm.Hyperparameters(preset="eos", train_seq_len=512, train_batch_tokens=512 * 64,
                        data_path=sys.argv[1])

def resident():  # of this process at its largest, and all that it has mapped now, in kB
    lines = open("/proc/self/status").read().split("\\n")
    return [int(line.split()[1]) for name in ("VmHWM", "VmSize") for line in lines
            if line.startswith(name)]

if sys.argv[2] == "documents":
    stream = tm.DocumentStream(hp)
else:
    stream = tm.TokenStream(sys.argv[1], "train")
stream.windows(range(64), 512)  # what the first batch needs of any stream
peak, size = resident()
resource.setrlimit(resource.RLIMIT_AS, (1024 * (size + 40_000),) * 2)
stream.measure(hp.vocab_size)
tokens = rows = 0
while tokens < stream.total:
    numbers = range(rows, rows + 64)
    tokens += int((stream.windows(numbers, 512)[:, 1:] != hp.pad_id).sum())
    rows += 64
print(json.dumps(dict(grown=resident()[0] - peak, tokens=tokens, files=len(stream.files))))
"""


@pytest.mark.parametrize("kind", ["documents", "ring"])
def test_a_hundred_shards_take_the_memory_of_one(tmp_path, kind):
    """100 shards of 1 MB are read once with 40 MB more address space than the first batch took."""
    content = np.random.default_rng(0).integers(2, 1024, 500_000)
    content[::700] = BOS
    write_shards(tmp_path, [content])
    first = tmp_path / "fineweb_train_000000.bin"
    for number in range(1, 100):
        (tmp_path / f"fineweb_train_{number:06d}.bin").write_bytes(first.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path), kind],
        env=clean_env(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] == 100 and 50_000_000 <= found["tokens"] < 50_000_000 + 64 * 512
    assert found["grown"] < 30_000  # kB
