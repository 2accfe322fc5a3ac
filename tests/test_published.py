"""tools/published.py: the corrected figures are those that the formulas give by hand."""

import dataclasses
import math
import re

import published
import pytest
import torch
from conftest import random_model, val_split

import train_mdlm as tm


def test_corrected_figures():
    assert published.exact_bytes(1.1465) == pytest.approx(2.024, abs=5e-4)
    assert published.exact_bytes(0.9901) == pytest.approx(1.748, abs=5e-4)
    found = [published.exact_bytes(bpb) for bpb in published.PR1106_TSTEP.values()]
    assert found == pytest.approx([2.043, 2.032, 2.027, 2.024], abs=1e-3)
    assert published.whole_range(1.3485, 0.05, 0.95) == pytest.approx(1.50, abs=5e-3)


def test_boundaries_cost_about_28_bits_a_window():
    """1.65 beginnings in 2,048 tokens: 11 bits for how many, 11 for each, less their order."""
    bytes_of_a_window = 2048 * published.BYTES / published.TOKENS
    bits = published.boundary_bpb(2048) * bytes_of_a_window
    assert bits == pytest.approx(28.3, abs=0.7)


def test_table_prints(tool):
    printed = tool(published).stdout
    assert "2.024" in printed and "1.748, with boundaries about 1.75" in printed
    assert printed.count("\n| ") == 10


def test_an_artifact_scored_as_published_and_exactly(tiny_env, tmp_path, tool):
    """An eos artifact: as published, over exact bytes, and with the places of <s> paid."""
    eos = dict(BACKBONE="dit", ANCHOR_BOS="1", DOC_CHUNKS="1")
    hp = tm.Hyperparameters.from_env(tiny_env | eos)
    model = random_model(hp, scale=0.05)
    tm.save_artifact(model, dataclasses.replace(hp, quant_mode="fp32"), tmp_path / "eos.mdlm")
    options = ["--data", tiny_env["DATA_PATH"], "--tokenizer", tiny_env["TOKENIZER_PATH"]]
    done = tool(published, tmp_path / "eos.mdlm", "--seqs", "70", "--steps", "4", *options)
    assert done.returncode == 0, done.stderr
    first, exact, paid = (float(x) for x in re.findall(r"\| (\d\.\d{4}) ± ", done.stdout))
    val = tm.TokenStream(hp.data_path, "val")
    tokens = torch.from_numpy(val.read(0, 70 * 32)).long()
    luts = tm.build_sentencepiece_luts(tm.load_tokenizer(hp.tokenizer_path, 384), 384)
    nbytes = int(tm.count_bytes(tokens, tm.BOS_ID, luts))
    assert first * 70 * 32 * 4.3 == pytest.approx(exact * nbytes, rel=1e-4)
    rows = tokens.view(70, 32)
    anchors = (rows == tm.BOS_ID).sum(1).tolist()
    assert sum(anchors) >= 3 and f"{sum(anchors)} places of" in done.stdout
    bits = sum(math.log2(33) + math.log2(math.comb(32, count)) for count in anchors)
    assert (paid - exact) * nbytes == pytest.approx(bits, rel=2e-3)
    # The T-step bound itself is close; it tells the model the true noise, not that of the step.
    generators = [tm.seeded("cpu", hp.seed, "published", number) for number in range(70)]
    ours = tm.discrete_elbo(model, rows, 4, generators).sum().item()
    assert exact * nbytes * math.log(2) == pytest.approx(ours, rel=0.05)


def test_windows_lie_back_to_back(tiny_env):
    """Each knows the token before it, also where a batch of them begins; the first has <s>."""
    hp = tm.Hyperparameters.from_env(tiny_env)
    val = val_split(hp)
    batches = list(published.first_windows(val, 32, 70))
    assert [rows.numbers for rows in batches] == [range(64), range(64, 70)]
    tokens = val.stream.read(0, 70 * 32).astype(int).tolist()
    assert torch.cat([rows.x0 for rows in batches]).flatten().tolist() == tokens
    before = torch.cat([rows.before for rows in batches]).tolist()
    assert before == [tm.BOS_ID, *tokens[31:-1:32]]


def test_the_model_is_told_the_noise_of_each_step(tiny_env, monkeypatch):
    """If every token costs one nat: four steps, then V choices for what the last noise leaves."""
    hp = tm.Hyperparameters.from_env(tiny_env)
    told = []

    def one_nat(model, z, window, hidden, masked_fraction):
        assert torch.equal(z == hp.mask_id, hidden)
        told.append(masked_fraction.tolist())
        return hidden.float()

    monkeypatch.setattr(tm, "token_nll", one_nat)
    x0 = torch.full((2, 32), 7)
    rows = published.Rows(range(2), x0, x0[:, 0])
    nats = published.published_bound(random_model(hp), rows, 4) * math.log(2)
    steps = [(1 - tm.TSTEP_EPS) * step / 4 for step in (1, 2, 3, 4)]
    for fractions, noise in zip(told, steps, strict=True):
        assert fractions == pytest.approx([noise, noise])
    keys = tm.random_keys(x0.shape, [tm.seeded("cpu", hp.seed, "published", n) for n in (0, 1)])
    expected = sum(weight * mask.sum(1) for mask, weight in tm.tstep_masks(4, keys))
    terminal = tm.TSTEP_EPS * 32 * math.log(384)
    assert (nats - expected).tolist() == pytest.approx([terminal] * 2, rel=1e-4)


def test_weights_that_diverged_and_single_windows_are_refused(tiny_env, tmp_path, tool):
    hp = tm.Hyperparameters.from_env(tiny_env)
    options = ["--data", tiny_env["DATA_PATH"], "--tokenizer", tiny_env["TOKENIZER_PATH"]]
    tm.save_artifact(random_model(hp), dataclasses.replace(hp, quant_mode="fp32"), tmp_path / "a")
    done = tool(published, tmp_path / "a", "--seqs", "1", *options)
    assert done.returncode == 2 and "1 window has no standard error" in done.stderr
    val = val_split(hp)
    model = random_model(hp)
    torch.nn.init.constant_(next(model.parameters()), math.inf)
    with pytest.raises(tm.InputError, match="is not a finite number: the weights have diverged"):
        published.measure(model, val, 2, 2)


def test_what_cannot_be_scored_is_one_line(tmp_path, tool):
    done = tool(published, tmp_path / "absent.mdlm")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
