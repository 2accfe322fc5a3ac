"""tools/frontier.py: the plans, the times, and a frontier of a few steps."""

import functools
import json
import os
import re

import frontier
import pytest
import sweep
import torch
from conftest import clean_env

import train_mdlm as tm


def test_the_models_differ_in_their_recipe_alone():
    golf, one, four, causal = frontier.compared([1, 4])
    hp = {model.name: tm.Hyperparameters.from_env(model.row) for model in (golf, one, four, causal)}
    assert list(hp) == ["golf", "1", "4", "ar"]
    block = tm.Hyperparameters(preset="block")
    for name, size in (("1", 1), ("4", 4)):
        assert hp[name].system == "block" and hp[name].block_size == size
        for knob in ("block_share", "causal_weight", "mask_dist", "loss_weight"):
            assert getattr(hp[name], knob) == getattr(block, knob)
    assert hp["golf"].system == "mdlm" and hp["golf"].mask_dist == "normal" and hp["ar"].causal
    assert [model.calls(128) for model in (golf, one, four, causal)] == [
        1,
        1 / 128,
        1 / 32,
        1 / 128,
    ]


def test_times_are_measured_once_and_believed_only_if_they_are_times(tmp_path, monkeypatch):
    models, path = frontier.compared([2]), tmp_path / "times.json"
    for damaged in ("[]", '{"golf": 1.0, "2": "fast"}', '{"golf": NaN}', '{"golf": 0}', "{"):
        path.write_text(damaged)
        with pytest.raises(tm.InputError, match="times.json"):
            frontier.step_times(models, tmp_path)
    times = {"golf": 1.0, "2": 2, "ar": 1.0}
    path.write_text(json.dumps(times))
    assert frontier.step_times(models, tmp_path, measure=False) == times


def test_missing_times_are_measured_beside_golf(tmp_path, monkeypatch):
    path, measured = tmp_path / "times.json", []

    def measure(models, out):
        measured.append([model.name for model in models])
        return {model.name: 3.0 * 2**place for place, model in enumerate(models)}

    monkeypatch.setattr(frontier, "measure_times", measure)
    with pytest.raises(tm.InputError, match="has not the times of 2, ar"):
        frontier.step_times(frontier.compared([2]), tmp_path, measure=False)
    assert frontier.step_times(frontier.compared([2]), tmp_path) == {"golf": 3, "2": 6, "ar": 12}
    path.write_text(path.read_text().replace("3.0", "1.5"))
    expected = {"golf": 1.5, "2": 6, "ar": 12, "8": 3}
    assert frontier.step_times(frontier.compared([2, 8]), tmp_path) == expected
    assert frontier.step_times(frontier.compared([8]), tmp_path, measure=False) == expected
    assert measured == [["golf", "2", "ar"], ["golf", "8"]]
    monkeypatch.setenv("MODEL_DIM", "64")
    with pytest.raises(tm.InputError, match="was measured with MODEL_DIM=.*, not 64"):
        frontier.step_times(frontier.compared([2]), tmp_path)


def test_without_golf_nothing_is_compared_with_it(tmp_path, monkeypatch):
    models = frontier.compared([2])
    found = {"golf": {}, "2": {1: 1.5}, "ar": {1: 1.4}}
    monkeypatch.setattr(
        frontier,
        "found_for",
        lambda model, *rest: dict(l2r=found[model.name], ar=found[model.name], nelbo={}),
    )
    ones = {model.name: 1 for model in models}
    rows = frontier.summarize(models, ones, ones, [1], tmp_path)
    assert [row["left_to_right"]["difference"] for row in rows] == [None] * 3


@pytest.fixture
def draw(tool, tiny_env, monkeypatch):
    """Calls the tool in the environment of a tiny run."""
    monkeypatch.setattr(os, "environ", clean_env(**tiny_env))
    return functools.partial(tool, frontier)


def test_a_frontier_is_trained_at_equal_steps_and_at_equal_time(draw, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "times.json").write_text('{"golf": 10.0, "4": 20.0, "ar": 8.0}')
    arguments = ("--steps", 8, "--blocks", 4, "--seeds", "1,2", "--seqs", 4, "--out", out)
    done = draw(*arguments)
    assert done.returncode == 0, done.stderr
    parts = json.loads((out / "frontier.json").read_text())
    steps = {title: [row["steps"] for row in rows] for title, rows in parts.items()}
    assert steps == {"Equal steps": [8, 8, 8], "Equal time": [8, 4, 10]}
    assert len(list((out / "logs").glob("*.txt"))) == 2 * 5 and (out / "frontier.png").exists()
    for rows in parts.values():
        golf, block, causal = (row["scores"] for row in rows)
        assert set(golf["l2r"]) == set(block["l2r"]) == set(causal["ar"]) == {"1", "2"}
        assert golf["nelbo"] and block["nelbo"] and block["ar"]
        assert not golf["ar"] and not causal["l2r"] and not causal["nelbo"]
        for row, values in ((1, block["l2r"]), (2, causal["ar"])):
            expected = sum(values[seed] - golf["l2r"][seed] for seed in ("1", "2")) / 2
            assert rows[row]["left_to_right"]["difference"] == pytest.approx(expected)
    log = next((out / "logs").glob("BLOCK_SIZE=4+*ITERATIONS=8_seed1.txt")).read_text()
    l2r = re.search(r"^score:l2r bpb:(\S+) .* seqs:4 ", log, re.MULTILINE)
    assert float(l2r[1]) == pytest.approx(parts["Equal steps"][1]["scores"]["l2r"]["1"], abs=1e-4)
    table = (out / "README.md").read_text()
    assert done.stdout.endswith(table) and "| 4 | 4 | 2.00 | 0.125 |" in table
    again = draw(*arguments, "--report")
    assert again.returncode == 0 and again.stdout == table


def test_what_it_did_not_make_is_left_alone(tmp_path, draw):
    for name in ("README.md", "frontier.json", "frontier.png"):
        path = tmp_path / name
        path.write_text("mine")
        done = draw("--steps", 8, "--out", tmp_path)
        assert done.returncode == 2 and name in done.stderr and path.read_text() == "mine"
        path.unlink()


def test_times_of_real_steps(tiny_env, tmp_path, monkeypatch):
    for name, value in tiny_env.items():
        monkeypatch.setenv(name, value)
    models = frontier.compared([4])
    times = frontier.measure_times(models, tmp_path)
    assert list(times) == ["golf", "4", "ar"] and min(times.values()) > 0
    assert sweep.Job(models[1].row, 1, tmp_path).hyperparameters().block_size == 4


def test_more_models_are_timed_than_the_compiler_has_variants(tiny_env, tmp_path, monkeypatch):
    for name, value in tiny_env.items():
        monkeypatch.setenv(name, value)

    def compiled(function, hp, device, **options):
        return torch.compile(function, backend="eager", **options)

    monkeypatch.setattr(tm, "compiled", compiled)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        assert len(frontier.measure_times(frontier.compared([]), tmp_path)) == 2
    torch._dynamo.reset()
