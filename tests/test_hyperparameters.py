"""Configuration: presets, the environment, what SCORES says, help and messages for people."""

import dataclasses
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, clean_env, run_python

import train_mdlm as tm

PUBLISHED_COMMAND = dict(
    NUM_LAYERS="8",
    MODEL_DIM="576",
    QUANT_MODE="fp8",
    MATRIX_LR="0.02",
    EMA_DECAY="0.999",
    EMA_START_FRAC="0.1",
    ITERATIONS="80000",
    MAX_WALLCLOCK_SECONDS="5400",
    FINAL_EVAL_T_SAMPLES="256",
    FINAL_EVAL_MAX_SEQS="0",
)


def test_published_command_of_pr_1699_is_the_default_system_run_longer():
    published = vars(tm.Hyperparameters.from_env(PUBLISHED_COMMAND))
    default = vars(tm.Hyperparameters())
    differing = {name for name in default if published[name] != default[name]}
    assert differing == {"iterations", "max_wallclock_seconds", "final_eval_t_samples"}


def test_preset_then_overrides():
    hp = tm.Hyperparameters(preset="ar", num_layers=4)
    assert (hp.objective, hp.num_layers, hp.model_dim, hp.matrix_lr) == ("ar", 4, 512, 0.04)
    assert hp == tm.Hyperparameters.from_env({"PRESET": "ar", "NUM_LAYERS": "4", "HOME": "/"})
    assert hp.mask_id == 1024 and hp.pad_id == 1025
    with pytest.raises(dataclasses.FrozenInstanceError):
        hp.num_layers = 5


def test_what_follows_from_the_objective():
    for objective, causal, rows, offsets, headline in (
        ("mdlm", False, 1025, [-2, -1, 1, 2], "nelbo"),
        ("ar", True, 1024, [-2, -1], "ar"),
    ):
        hp = tm.Hyperparameters(objective=objective, neighbors=2)
        assert hp.causal is causal and hp.embedding_rows == rows
        assert hp.neighbor_offsets == offsets and hp.headline == headline
    assert tm.Hyperparameters(doc_chunks=True).embedding_rows == 1026


# ---- Wrong values


@pytest.mark.parametrize(
    "given, message",
    [
        ("NUM_KV_HEADS=3", "NUM_KV_HEADS=3 must divide NUM_HEADS=8"),
        ("NUM_HEADS=7", "NUM_HEADS=7 must divide MODEL_DIM=576"),
        ("NUM_HEADS=64 NUM_KV_HEADS=64", "must be even"),
        ("NUM_LAYERS=8.5", "NUM_LAYERS=8.5 is not a whole number"),
        ("NUM_LAYERS=0", "NUM_LAYERS=0 is not between 1 and 200"),
        ("NUM_LAYERS=", "NUM_LAYERS= is not a whole number"),
        ("BETA2=1", "BETA2=1.0 is not between"),
        (f"SEED={2**70}", "is not between 0 and"),
        ("EMA_DECAY=nan", "EMA_DECAY=nan is not between 0 and 1"),
        ("EMA_DECAY=1.5", "EMA_DECAY=1.5 is not between 0 and 1"),
        ("TIE_EMBEDDINGS=yes", "TIE_EMBEDDINGS=yes is not 0 or 1"),
        (
            "PRESET=mdml",
            "PRESET=mdml is not one of mdlm, mdlm16, golf, block, llada, eos, ar, demo",
        ),
        ("PACK=gzip", "PACK=gzip is not one of auto, zlib, huffman, lzma, zstd"),
        ("MASK_EPS=0.5 MASK_MAX=0.5", "MASK_EPS=0.5 must be smaller than MASK_MAX=0.5"),
        (
            "OBJECTIVE=ar ANCHOR_BOS=1",
            "OBJECTIVE=ar, BLOCK_SIZE and (BACKBONE=dit, DOC_CHUNKS, ANCHOR_BOS) do not mix",
        ),
        (
            "PRESET=llada OBJECTIVE=ar",
            "OBJECTIVE=ar, BLOCK_SIZE and (BACKBONE=dit, DOC_CHUNKS, ANCHOR_BOS) do not mix",
        ),
        ("RUN_ID=../x", "RUN_ID=../x: letters"),
    ],
)
def test_wrong_values_are_one_clear_line(given, message):
    env = dict(item.split("=", 1) for item in given.split())
    with pytest.raises(tm.InputError) as caught:
        tm.Hyperparameters.from_env(env)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_python_values(monkeypatch):
    monkeypatch.setitem(tm.PRESETS, "typo", {"num_layer": 2})
    with pytest.raises(tm.InputError, match=r"num_layer \(did you mean num_layers\?\)"):
        tm.Hyperparameters(preset="typo")
    with pytest.raises(tm.InputError, match=r"num_layer \(did you mean num_layers\?\)"):
        tm.Hyperparameters(num_layer=2)
    with pytest.raises(tm.InputError, match="NUM_LAYERS=2.0"):
        tm.Hyperparameters(num_layers=2.0)
    with pytest.raises(tm.InputError, match="NUM_LAYERS=True"):
        tm.Hyperparameters(num_layers=True)


def test_near_misses_name_what_was_probably_meant():
    env = {"NUM_LAYER": "3", "ITERATION": "5", "NUM_LAYERS": "3", "HOME": "/", "LANG": "C"}
    assert tm.near_misses(env) == [
        "warning: environment variable ITERATION is not read (did you mean ITERATIONS?)",
        "warning: environment variable NUM_LAYER is not read (did you mean NUM_LAYERS?)",
    ]


def test_a_near_miss_is_told_of_before_the_error_that_it_explains(
    tiny_env, tmp_path, monkeypatch, script
):
    monkeypatch.chdir(tmp_path)
    env = {name.replace("DATA_PATH", "DATA_PTH"): value for name, value in tiny_env.items()}
    done = script(**env)
    warning, error = done.stderr.splitlines()
    assert warning == "warning: environment variable DATA_PTH is not read (did you mean DATA_PATH?)"
    assert error.startswith("train_mdlm.py: error: no val shards in DATA_PATH=./data/datasets/")
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())


def test_a_near_miss_is_in_the_log_too(tiny_env, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    done = script(RUN_ID="near", MATRIX_LRS="0.1", **tiny_env | dict(ITERATIONS="1"))
    warning = "warning: environment variable MATRIX_LRS is not read (did you mean MATRIX_LR?)\n"
    assert done.returncode == 0 and done.stderr == warning and warning not in done.stdout
    assert (tmp_path / "logs/near.txt").read_text(encoding="utf-8").count(warning) == 1


@pytest.mark.parametrize(
    "arguments, env",
    [
        ([], {"NUM_KV_HEADS": "3"}),
        (["--lr", "1"], {}),
        ([], {"EVAL_ONLY": "x"}),
        ([], {"DATA_PATH": "nowhere"}),
    ],
)
def test_user_errors_exit_with_2_and_no_traceback(arguments, env, tmp_path):
    done = run_python("train_mdlm.py", *arguments, cwd=tmp_path, check=False, **env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train_mdlm.py: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_import_has_no_side_effect(tmp_path):
    env = dict(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", "import train_mdlm; print(train_mdlm.Hyperparameters().preset)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_env(**env, PRESET="nonsense", NUM_LAYERS="-1"),
    )
    assert done.stdout == "mdlm\n" and done.stderr == "" and not list(tmp_path.iterdir())


# ---- Help


def collapsed(text):
    return " ".join(text.split())


def test_help_lists_every_hyperparameter_with_its_presets(script):
    done = script("--help")
    text = done.stdout
    assert done.returncode == 0 and not done.stderr and text.startswith(tm.__doc__.strip())
    assert script("-h").stdout == text and max(map(len, text.splitlines())) <= 120
    knobs = text.removeprefix(tm.__doc__.strip())
    for spec in dataclasses.fields(tm.Hyperparameters):
        assert knobs.count(f"\n    {spec.name.upper()}=") == 1
        assert collapsed(spec.metadata["meaning"]) in collapsed(knobs)
        assert " | ".join(tm.choices_of(spec)) in collapsed(knobs)
    assert "ar: 0.04" in knobs and "demo: 4" in knobs


@pytest.mark.parametrize("group", tm.GROUPS)
def test_help_on_a_group_is_a_screen_about_this_group_only(script, group):
    done = script("--help", group)
    title, *lines = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr
    assert title == f"{group}: {tm.GROUPS[group]}"
    assert len(lines) < 48 and max(map(len, lines)) <= 120
    knobs = [line[4:].partition("=")[0] for line in lines if line[4] != " "]
    specs = dataclasses.fields(tm.Hyperparameters)
    assert knobs == [spec.name.upper() for spec in specs if spec.metadata["group"] == group]


def test_every_knob_is_in_a_group():
    specs = dataclasses.fields(tm.Hyperparameters)
    assert list(dict.fromkeys(spec.metadata["group"] for spec in specs)) == list(tm.GROUPS)
    assert set(tm.RESULT_GROUPS) < tm.GROUPS.keys()


def test_help_on_an_unknown_group_is_one_line(script):
    done = script("--help", "nonsense")
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_mdlm.py: error: --help nonsense: ")
    assert all(group in done.stderr for group in tm.GROUPS)


# ---- What SCORES says


def scores(text, **overrides):
    return tm.final_scores(tm.Hyperparameters(scores=text, **overrides))


@pytest.mark.parametrize(
    "text, requested",
    [
        ("", {}),
        ("nelbo,l2r", {"nelbo": None, "l2r": None}),
        ("l2r:8", {"l2r": 8}),
        ("l2r:0", {"l2r": 0}),
        (" l2r : 8 , tstep:500,", {"l2r": 8, "tstep": 500}),
        ("ar:3", {"ar": 3}),  # of the other objective: known, and left out when it comes to it
    ],
)
def test_scores_are_names_with_numbers_of_windows(text, requested):
    assert tm.Hyperparameters(scores=text).requested_scores == requested


@pytest.mark.parametrize("text", ["l2r:", "l2r:x", "l2r:-1", "l2r:1.5", "l2r:8:8", "nelbo,l2r: "])
def test_a_number_of_windows_is_a_number(text):
    with pytest.raises(tm.InputError, match="number of windows") as caught:
        tm.Hyperparameters(scores=text)
    assert str(caught.value).startswith(f"SCORES={text}: ") and "\n" not in str(caught.value)


def test_a_score_is_named_once():
    with pytest.raises(tm.InputError, match="SCORES=l2r:4,nelbo,l2r names l2r twice"):
        tm.Hyperparameters(scores="l2r:4,nelbo,l2r")


@pytest.mark.parametrize("text", ["r2l", "nelbo,r2l:8", "L2R", "nelbo l2r", "l2r;nelbo", ":8"])
def test_an_unknown_score_is_refused(text):
    with pytest.raises(tm.InputError, match=" is not one of nelbo, l2r, .*, ar") as caught:
        tm.Hyperparameters(scores=text)
    assert str(caught.value).startswith(f"SCORES={text}: ")


def test_the_headline_comes_first_with_the_windows_of_its_knob():
    assert scores("") == {"nelbo": 0}
    assert scores("l2r:8,nelbo") == {"nelbo": 0, "l2r": 8}
    assert list(scores("l2r:8,nelbo")) == ["nelbo", "l2r"]
    assert scores("nelbo", final_eval_max_seqs=40) == {"nelbo": 40}
    assert scores("nelbo:16", final_eval_max_seqs=40) == {"nelbo": 16}
    assert scores("nelbo:0", final_eval_max_seqs=40) == {"nelbo": 0}


def test_other_scores_have_a_default_number_of_windows():
    windows = dict(l2r=512, sliding=4096, sliding_nelbo=4096)
    windows |= dict(confidence=256, random=256, tstep=1024, tgrid=256)
    found = scores(",".join(["nelbo", *windows]), final_eval_max_seqs=40)
    assert found == {"nelbo": 40} | windows
    assert {name: row.windows for name, row in tm.ESTIMATORS["mdlm"].items()} == (
        {"nelbo": 0} | windows
    )


def test_the_published_knob_adds_the_published_grid():
    """FINAL_EVAL_T_SAMPLES, with as many windows as the headline; SCORES may say another number."""
    grid = dict(final_eval_t_samples=256)
    assert scores("l2r:8", **grid) == {"nelbo": 0, "l2r": 8, "tgrid": 0}
    assert scores("", final_eval_max_seqs=40, **grid) == {"nelbo": 40, "tgrid": 40}
    assert scores("tgrid:7", final_eval_max_seqs=40, **grid) == {"nelbo": 40, "tgrid": 7}
    assert "tgrid" not in scores("", objective="ar", **grid)


def test_scores_of_the_other_objective_are_left_out():
    assert scores("nelbo,l2r:3,sliding:5", objective="ar") == {"ar": 0, "sliding": 5}
    assert scores("ar:3,l2r:4") == {"nelbo": 0, "l2r": 4}
    assert scores("ar:3", objective="ar", final_eval_max_seqs=40) == {"ar": 3}


ABSURD = dict(
    MODEL_DIM=10**6,
    TRAIN_BATCH_TOKENS=32 * 10**9,
    TRAIN_SEQ_LEN=10**9,
    QUANT_FEEDBACK=10**12,
    WARMUP_STEPS=10**12,
    MUON_BACKEND_STEPS=10**12,
    MICRO_BATCH_TOKENS=10**12,
    VAL_BATCH_SIZE=10**12,
    NELBO_PASSES=10**12,
    TSTEP_STEPS=10**12,
    FINAL_EVAL_T_SAMPLES=10**12,
    MLP_MULT=10**6,
)


@pytest.mark.parametrize("name", ABSURD)
def test_ranges_end_where_they_stop_to_make_sense(name):
    with pytest.raises(tm.InputError, match=f"{name}={ABSURD[name]} is not between"):
        tm.Hyperparameters.from_env({name: str(ABSURD[name])})


def test_what_cannot_fit_is_refused_with_figures_before_it_is_built(monkeypatch):
    """20 bytes for each weight, and what a micro-batch keeps for its gradient."""
    gib = 2**30
    monkeypatch.setattr(tm.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 16 * gib))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(tm, "build_model", None)
    cpu = torch.device("cpu")
    for fits in ("mdlm", "golf", "demo", "llada"):
        tm.check_memory(tm.Hyperparameters(preset=fits), cpu)
    wide = dict(model_dim=16_384, num_heads=128, num_kv_heads=64)
    hp = tm.Hyperparameters(num_layers=4, vocab_size=1024, train_batch_tokens=65_536, **wide)
    matrices = 4 * (2 + 1 + 4) * 16_384**2
    weights = f"weights and optimizer {20 * matrices / gib:.1f}"[:-2]
    with pytest.raises(tm.InputError) as caught:
        tm.check_memory(hp, cpu)
    message = str(caught.value)
    assert "than the 16.0 there are" in message and weights in message
    assert "activations 96.0, logits" in message and "MODEL_DIM=16384" in message
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "512")
    with pytest.raises(tm.InputError, match=r"than the 0\.0 there are"):
        tm.check_memory(tm.Hyperparameters(preset="demo"), cpu)


def test_on_a_gpu_its_own_memory_counts(monkeypatch):
    gpu = torch.device("cuda", 0)
    hp = tm.Hyperparameters(compute_dtype="bfloat16")

    def properties(device):
        return types.SimpleNamespace(total_memory=gib * 2**30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    gib = 80
    tm.check_memory(hp, gpu)
    gib = 2
    with pytest.raises(tm.InputError, match=r"than the 2\.0 there are"):
        tm.check_memory(hp, gpu)


def test_what_is_counted_is_less_than_what_a_run_takes():
    """Peak memory of one step, measured in a process of its own."""
    code = """
import re, torch, train_mdlm as tm
def peak():  # not ru_maxrss, which begins with that of the parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
hp = tm.Hyperparameters(preset="golf", num_layers=4, train_batch_tokens=4096, train_seq_len=256,
                        model_dim=384, num_heads=6, micro_batch_tokens=4096)
found = {}
tm.os.sysconf = lambda name: 0
try: tm.check_memory(hp, torch.device("cpu"))
except tm.InputError as error: message = str(error)
parts = message.partition(": ")[2].partition(";")[0]
counted = sum(float(part.rpartition(" ")[2]) for part in parts.split(", ")) * 2**30
before = peak()
model = tm.build_model(hp)
optimizer = tm.Optimizer(model, hp)
tokens = torch.randint(2, 1024, (16, 256))
noise = tm.draw_noise(hp, tm.seeded("cpu", 0))[:2]
tm.batch_loss(model, tm.masked_batch(hp, tokens, *noise, tm.scored_capacity(hp, 16))).backward()
print(counted, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    counted, measured = map(float, done.stdout.split())
    assert 0.25 * measured < counted < measured
