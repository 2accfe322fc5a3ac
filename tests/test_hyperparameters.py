"""Configuration: presets, the environment, messages for people."""

import dataclasses
import subprocess
import sys

import pytest

import train_mdlm as tm
from conftest import ROOT, clean_env, run_python

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
    published, default = tm.Hyperparameters.from_env(PUBLISHED_COMMAND), tm.Hyperparameters()
    differing = {f.name for f in dataclasses.fields(default) if getattr(published, f.name) != getattr(default, f.name)}
    assert differing == {"iterations", "max_wallclock_seconds", "final_eval_t_samples"}


def test_preset_then_overrides():
    hp = tm.Hyperparameters(preset="ar", num_layers=4)
    assert (hp.objective, hp.num_layers, hp.model_dim, hp.matrix_lr) == ("ar", 4, 512, 0.04)
    assert hp == tm.Hyperparameters.from_env({"PRESET": "ar", "NUM_LAYERS": "4", "HOME": "/"})
    assert hp.mask_id == 1024 and hp.pad_id == 1025
    with pytest.raises(dataclasses.FrozenInstanceError):
        hp.num_layers = 5


@pytest.mark.parametrize(
    "env, message",
    [
        ({"NUM_KV_HEADS": "3"}, "NUM_KV_HEADS=3 must divide NUM_HEADS=8"),
        ({"NUM_HEADS": "7"}, "NUM_HEADS=7 must divide MODEL_DIM=576"),
        ({"NUM_HEADS": "64", "NUM_KV_HEADS": "64"}, "must be even"),
        ({"NUM_LAYERS": "8.5"}, "NUM_LAYERS=8.5 is not a whole number"),
        ({"NUM_LAYERS": "0"}, "NUM_LAYERS=0 is not between 1 and 200"),
        ({"NUM_LAYERS": ""}, "NUM_LAYERS= is not a whole number"),
        ({"BETA2": "1"}, "BETA2=1.0 is not between"),
        ({"SEED": str(2**70)}, "is not between 0 and"),
        ({"EMA_DECAY": "nan"}, "EMA_DECAY=nan is not a number"),
        ({"EMA_DECAY": "1.5"}, "EMA_DECAY=1.5 is not between 0 and 1"),
        ({"TIE_EMBEDDINGS": "yes"}, "TIE_EMBEDDINGS=yes is not 0 or 1"),
        ({"PRESET": "mdml"}, "PRESET=mdml is not one of mdlm, mdlm16, golf, llada, eos, ar, demo"),
        ({"PACK": "gzip"}, "PACK=gzip is not one of auto, zlib, huffman, lzma, zstd"),
        ({"MASK_EPS": "0.5", "MASK_MAX": "0.5"}, "MASK_EPS=0.5 must be smaller than MASK_MAX=0.5"),
        (
            {"OBJECTIVE": "ar", "ANCHOR_BOS": "1"},
            "OBJECTIVE=ar does not go with BACKBONE=unet DOC_CHUNKS=0 ANCHOR_BOS=1",
        ),
        ({"PRESET": "llada", "OBJECTIVE": "ar"}, "OBJECTIVE=ar does not go with BACKBONE=dit"),
        ({"RUN_ID": "../x"}, "RUN_ID=../x: letters"),
    ],
)
def test_wrong_values_are_one_clear_line(env, message):
    with pytest.raises(ValueError) as caught:
        tm.Hyperparameters.from_env(env)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_python_values():
    with pytest.raises(ValueError, match=r"num_layer \(did you mean num_layers\?\)"):
        tm.Hyperparameters(num_layer=2)
    with pytest.raises(ValueError, match="NUM_LAYERS=2.0"):
        tm.Hyperparameters(num_layers=2.0)
    with pytest.raises(ValueError, match="NUM_LAYERS=True"):
        tm.Hyperparameters(num_layers=True)


def test_near_misses_name_what_was_probably_meant():
    warnings = tm.near_misses({"NUM_LAYER": "3", "ITERATION": "5", "NUM_LAYERS": "3", "HOME": "/", "LANG": "C"})
    assert warnings == [
        "warning: environment variable ITERATION is not read (did you mean ITERATIONS?)",
        "warning: environment variable NUM_LAYER is not read (did you mean NUM_LAYERS?)",
    ]


def test_help_lists_every_hyperparameter_with_its_presets():
    text = run_python("train_mdlm.py", "--help", cwd=ROOT).stdout
    for spec in dataclasses.fields(tm.Hyperparameters):
        assert f"    {spec.name.upper()}=" in text and spec.metadata["meaning"] in text
    assert "ar: 0.04" in text and "demo: 4" in text


@pytest.mark.parametrize(
    "arguments, env",
    [([], {"NUM_KV_HEADS": "3"}), (["--lr", "1"], {}), ([], {"EVAL_ONLY": "x"}), ([], {"DATA_PATH": "nowhere"})],
)
def test_user_errors_exit_with_2_and_no_traceback(arguments, env, tmp_path):
    done = run_python("train_mdlm.py", *arguments, cwd=tmp_path, check=False, **env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train_mdlm.py: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_import_has_no_side_effect(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import train_mdlm; print(train_mdlm.Hyperparameters().preset)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_env(PYTHONPATH=str(ROOT), PRESET="nonsense", NUM_LAYERS="-1", PYTHONDONTWRITEBYTECODE="1"),
    )
    assert done.stdout == "mdlm\n" and done.stderr == "" and not list(tmp_path.iterdir())
