"""Every preset: its values are the published ones, and it trains, packs, reloads and scores."""

import dataclasses
import re

import pytest
from conftest import ROOT, torchrun

import train_mdlm as tm

TOY = dict(
    NUM_LAYERS="2",
    NUM_KV_HEADS="4",
    WARMDOWN_ITERS="4",
    LR_WARMUP_STEPS="2",
    FINAL_EVAL_MAX_SEQS="40",
    SCORES="nelbo,l2r:4,tstep:8",
    TSTEP_STEPS="8",
)


def joined(*parts):
    """One dict of several without common keys."""
    whole = {}
    for part in parts:
        assert not whole.keys() & part.keys()
        whole |= part
    return whole


# What the published figures were made with
MDLM = joined(
    dict(backbone="unet", num_layers=8, model_dim=576, num_heads=8, num_kv_heads=4, mlp_mult=2),
    dict(tie_embeddings=True, logit_softcap=30.0, qk_gain_init=1.5, doc_chunks=False),
    dict(time_sampling="stratified", mask_eps=0.001, mask_max=1.0),
    dict(loss_weight="elbo", weight_clamp=100.0),
    dict(train_seq_len=1024, train_batch_tokens=524_288),
    dict(optimizer="muon", matrix_lr=0.02, tied_embed_lr=0.05, scalar_lr=0.04),
    dict(muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500),
    dict(muon_backend_steps=5, grad_clip_norm=1.0, warmdown_iters=1200, warmdown_shape="linear"),
    dict(ema_decay=0.999, ema_start_frac=0.1, quant_mode="fp8"),
)
LLADA = joined(
    dict(backbone="dit", num_layers=11, model_dim=512, num_heads=8, num_kv_heads=8, mlp_mult=3),
    dict(tie_embeddings=False, logit_softcap=0.0, rope_base=10_000.0),
    dict(time_sampling="antithetic", mask_eps=0.0, mask_max=0.999, loss_weight="dsigma"),
    dict(train_seq_len=2048, train_batch_tokens=65_536, iterations=6000),
    dict(optimizer="adamw", matrix_lr=6e-4, embed_lr=6e-4, head_lr=6e-4, scalar_lr=6e-4),
    dict(beta1=0.9, beta2=0.95, weight_decay=0.1, weight_decay_on="all", grad_clip_norm=1.0),
    dict(lr_warmup_steps=300, warmdown_iters=1500, warmdown_shape="cosine", min_lr_frac=0.1),
    dict(ema_decay=0.0, doc_chunks=False, anchor_bos=False, tstep_steps=512),
    dict(scores="nelbo,l2r:64,tstep:500"),
)
EOS = LLADA | dict(doc_chunks=True, anchor_bos=True, tstep_steps=128)
PUBLISHED = dict(mdlm=MDLM, llada=LLADA, eos=EOS)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_was_published(preset):
    hp = tm.Hyperparameters(preset=preset)
    assert {name: getattr(hp, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]


def test_golf_and_demo_are_one_recipe_and_mdlm_stays_what_was_published():
    golf, demo, mdlm = (tm.Hyperparameters(preset=name) for name in ("golf", "demo", "mdlm"))

    of_batch_and_size = ("tied_embed_lr", "embed_lr", "quant_mode")

    def recipe(hp):
        names = [
            spec.name
            for spec in dataclasses.fields(hp)
            if spec.metadata["group"] in ("noise", "optimizer", "export")
            and spec.name not in of_batch_and_size
        ]
        return {name: getattr(hp, name) for name in [*names, "warmdown_iters", "warmdown_frac"]}

    assert recipe(golf) == recipe(demo) != recipe(mdlm)
    assert tm.predicted_bytes(golf) <= tm.SIZE_LIMIT_BYTES and not tm.PRESETS["mdlm"]
    assert golf.max_wallclock_seconds == 600 and golf.train_batch_tokens == 524_288
    assert (golf.vocab_size, demo.vocab_size, mdlm.vocab_size) == (8192, 4096, 1024)


def scores_in(log):
    """Name and bits per byte of every score."""
    return re.findall(r"^score:(\w+) bpb:(\S+) ", log, re.MULTILINE)


@pytest.mark.parametrize("preset", tm.PRESETS)
def test_every_preset_trains_packs_reloads_and_scores(
    tiny_env, tmp_path, monkeypatch, capsys, preset
):
    monkeypatch.chdir(tmp_path)
    tm.run(tiny_env | TOY | dict(PRESET=preset, RUN_ID="toy"))
    log = capsys.readouterr().out
    _, hp = tm.load_artifact("logs/toy.mdlm")
    assert hp.preset == preset and hp.backbone == tm.Hyperparameters(preset=preset).backbone
    losses = [float(loss) for loss in re.findall(r"train_loss:(\S+)", log)]
    assert len(losses) == 12 and losses[-1] < losses[0]
    scores = scores_in(log)
    expected = dict(mdlm=["nelbo", "l2r", "tstep"], ar=["ar"], block=["l2r", "nelbo"])
    assert [name for name, _ in scores] == expected[hp.system]
    assert all(2 < float(bpb) < 9 for _, bpb in scores)
    paid = re.findall(r" boundary_bits:\S+ boundary_bpb:0\.\d{4}$", log, re.MULTILINE)
    assert len(paid) == (3 if hp.anchor_bos else 0) and hp.anchor_bos is (preset == "eos")
    # The artifact names its preset.
    tm.run(tiny_env | TOY | dict(EVAL_ONLY="logs/toy.mdlm", RUN_ID="again"))
    assert scores_in(capsys.readouterr().out) == scores


def test_documents_on_two_processes_train_the_same_model(tiny_env, tmp_path, capsys, monkeypatch):
    env = tiny_env | TOY | dict(PRESET="eos", SCORES="nelbo", MICRO_BATCH_TOKENS="128")
    pair = torchrun("--standalone", "--nproc_per_node=2", cwd=tmp_path, RUN_ID="pair", **env)
    monkeypatch.chdir(tmp_path)
    tm.run(env | dict(RUN_ID="alone"))
    alone, printed = capsys.readouterr().out, pair.communicate(timeout=300)[0]
    assert pair.returncode == 0 and "world_size:2 grad_accum_steps:2" in printed
    assert "grad_accum_steps:4" in alone

    def figures(text):
        return [float(figure) for figure in re.findall(r"(?:train_loss|val_bpb):(\S+)", text)]

    assert figures(printed) == pytest.approx(figures(alone), abs=5e-3)
    assert len(figures(alone)) == 15


def readme_presets():
    """The rows of README's table of presets, by the name of the preset."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    header = r"^\| `PRESET=` \| what it is \| parameters \| artifact bytes \|\n\|[-:| ]+\|\n"
    table = re.search(header + r"((?:\|.*\|\n)+)", readme, re.MULTILINE)
    assert table, "README.md has no table of presets"
    rows = [line.strip("|").split("|") for line in table[1].splitlines()]
    assert all(len(row) == 4 for row in rows)
    return {re.match(r" `(\w+)`", row[0])[1]: [cell.strip() for cell in row] for row in rows}


def test_the_readme_has_every_preset_once_and_names_the_default():
    rows = readme_presets()
    assert list(rows) == list(tm.PRESETS)
    default = tm.Hyperparameters().preset
    assert [name for name, row in rows.items() if "(default)" in row[0]] == [default]


@pytest.mark.parametrize("preset", tm.PRESETS)
def test_the_readme_has_the_true_sizes(preset):
    _, _, parameters, artifact = readme_presets()[preset]
    hp = tm.Hyperparameters(preset=preset)
    code = len((ROOT / "train_mdlm.py").read_bytes())
    predicted = tm.predicted_bytes(hp) - code
    assert parameters == f"{sum(p.numel() for p in tm.outline_model(hp).parameters()):,}"
    assert f"{predicted / 1e6:.2f} M predicted" in artifact
    assert ("over the limit" in artifact) == (predicted + code > tm.SIZE_LIMIT_BYTES)
