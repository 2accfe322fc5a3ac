"""Every preset: its values are the published ones, and it trains, packs, reloads and scores at toy size."""

import re

import pytest

import train_mdlm as tm
from conftest import ROOT, torchrun

TOY = dict(
    NUM_LAYERS="2",
    NUM_KV_HEADS="4",
    WARMDOWN_ITERS="4",
    LR_WARMUP_STEPS="2",
    FINAL_EVAL_MAX_SEQS="40",
    SCORES="nelbo,l2r,tstep",
    L2R_SEQS="4",
    TSTEP_SEQS="8",
    TSTEP_STEPS="8",
)
PUBLISHED = {  # what PUBLISHED figures were made with
    "mdlm": dict(
        backbone="unet",
        num_layers=8,
        model_dim=576,
        num_heads=8,
        num_kv_heads=4,
        mlp_mult=2,
        tie_embeddings=True,
        logit_softcap=30.0,
        qk_gain_init=1.5,
        mask_eps=0.001,
        mask_max=1.0,
        time_sampling="stratified",
        loss_weight="elbo",
        weight_clamp=100.0,
        train_seq_len=1024,
        train_batch_tokens=524_288,
        optimizer="muon",
        matrix_lr=0.02,
        tied_embed_lr=0.05,
        scalar_lr=0.04,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=500,
        muon_backend_steps=5,
        grad_clip_norm=1.0,
        warmdown_iters=1200,
        warmdown_shape="linear",
        ema_decay=0.999,
        ema_start_frac=0.1,
        quant_mode="fp8",
        doc_chunks=False,
    ),
    "llada": dict(
        backbone="dit",
        num_layers=11,
        model_dim=512,
        num_heads=8,
        num_kv_heads=8,
        mlp_mult=3,
        tie_embeddings=False,
        logit_softcap=0.0,
        mask_eps=0.0,
        mask_max=0.999,
        time_sampling="antithetic",
        loss_weight="dsigma",
        train_seq_len=2048,
        train_batch_tokens=65_536,
        optimizer="adamw",
        matrix_lr=6e-4,
        embed_lr=6e-4,
        head_lr=6e-4,
        scalar_lr=6e-4,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        weight_decay_on="all",
        grad_clip_norm=1.0,
        lr_warmup_steps=300,
        warmdown_iters=1500,
        warmdown_shape="cosine",
        min_lr_frac=0.1,
        iterations=6000,
        ema_decay=0.0,
        doc_chunks=False,
        anchor_bos=False,
        tstep_steps=512,
        tstep_seqs=500,
        rope_base=10_000.0,
    ),
}
PUBLISHED["eos"] = PUBLISHED["llada"] | dict(doc_chunks=True, anchor_bos=True, tstep_steps=128, lr_cycle_steps=6000)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_was_published(preset):
    hp = tm.Hyperparameters(preset=preset)
    assert {name: getattr(hp, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]


def test_golf_and_demo_are_one_recipe_and_mdlm_stays_what_was_published():
    golf, demo, mdlm = (tm.Hyperparameters(preset=name) for name in ("golf", "demo", "mdlm"))
    rates = {"tied_embed_lr", "embed_lr", "head_lr", "scalar_lr"}  # for the size of the batch

    def recipe(hp):
        groups = ("noise", "optimizer", "export")
        fields = [f.name for f in tm.dataclasses.fields(hp) if f.metadata["group"] in groups]
        return {name: getattr(hp, name) for name in [*fields, "warmdown_iters", "warmdown_frac"] if name not in rates}

    assert recipe(golf) == recipe(demo) != recipe(mdlm)
    assert tm.predicted_bytes(golf) <= tm.SIZE_LIMIT_BYTES and not tm.PRESETS["mdlm"]
    assert [golf.max_wallclock_seconds, golf.train_batch_tokens, golf.vocab_size] == [600.0, 524_288, 1024]


@pytest.mark.parametrize("preset", tm.PRESETS)
def test_every_preset_trains_packs_reloads_and_scores(tiny_env, tmp_path, monkeypatch, capsys, preset):
    monkeypatch.chdir(tmp_path)
    causal, anchored = preset == "ar", preset == "eos"
    tm.run(tiny_env | TOY | dict(PRESET=preset, RUN_ID="toy"))
    log = capsys.readouterr().out
    model, hp = tm.load_artifact("logs/toy.mdlm")
    assert hp.preset == preset and hp.backbone == tm.Hyperparameters(preset=preset).backbone
    losses = [float(x) for x in re.findall(r"train_loss:(\S+)", log)]
    assert len(losses) == 12 and losses[-1] < losses[0]
    scores = re.findall(r"^score:(\w+) bpb:(\S+) ", log, re.MULTILINE)
    assert [name for name, _ in scores] == (["ar"] if causal else ["nelbo", "l2r", "tstep"])
    assert all(2 < float(bpb) < 9 for _, bpb in scores)
    paid = re.findall(r" boundary_bits:\S+ boundary_bpb:0\.\d{4}$", log, re.MULTILINE)
    assert len(paid) == (3 if anchored else 0)
    tm.run(tiny_env | TOY | dict(EVAL_ONLY="logs/toy.mdlm", RUN_ID="again"))  # the artifact names its preset
    again = capsys.readouterr().out
    assert re.findall(r"^score:(\w+) bpb:(\S+) ", again, re.MULTILINE) == scores


def test_documents_on_two_processes_train_the_same_model(tiny_env, tmp_path, capsys, monkeypatch):
    env = tiny_env | TOY | dict(PRESET="eos", SCORES="nelbo", MICRO_BATCH_TOKENS="128")
    pair = torchrun("--standalone", "--nproc_per_node=2", cwd=tmp_path, RUN_ID="pair", **env)
    monkeypatch.chdir(tmp_path)
    tm.run(env | dict(RUN_ID="alone"))
    alone, printed = capsys.readouterr().out, pair.communicate(timeout=300)[0]
    assert pair.returncode == 0 and "world_size:2 grad_accum_steps:2" in printed and "grad_accum_steps:4" in alone

    def figures(text):
        return [float(x) for x in re.findall(r"(?:train_loss|val_bpb):(\S+)", text)]

    assert figures(printed) == pytest.approx(figures(alone), abs=5e-3) and len(figures(alone)) == 15


@pytest.mark.parametrize("preset", tm.PRESETS)
def test_the_readme_has_the_true_sizes(preset):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = re.search(rf"^\| `{preset}`[^|]*\|(.*)\|$", readme, re.MULTILINE)[1].split("|")
    hp = tm.Hyperparameters(preset=preset)
    code = len((ROOT / "train_mdlm.py").read_bytes())
    predicted = tm.predicted_bytes(hp) - code
    parameters = sum(p.numel() for p in tm.build_model(hp).parameters())
    assert cells[1].strip() == f"{parameters:,}" and cells[2].strip() == f"{hp.train_batch_tokens:,}"
    assert f"{predicted / 1e6:.2f} M predicted" in cells[3]
    assert ("over the limit" in cells[3]) == (predicted + code > tm.SIZE_LIMIT_BYTES)
