"""Shared by all tests: the script as a module, a tiny model with random weights, small shards."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# The models are tiny: several threads, or workers with several each, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell lets its background jobs ignore Ctrl-C, and nohup the end of a terminal; so would the
# processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "records/track_non_record_16mb/2026-11-25_MDLM_demo_docs"  # a record of 3 seeds
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tools")]

import train_mdlm as tm  # noqa: E402

FAST_BFLOAT16 = tm.FAST_BFLOAT16  # as it is in the processes that a test starts
tm.FAST_BFLOAT16 = False  # the same arithmetic on every processor

WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or
had an they which one you were her all she there would their we him been has when who will more
no if out so said what up its about into than them can only other new some could time these two
may then do first any my now such like our over man me even most made after also did many before
must through years where much your way well down should because each just those people mr how
too little state good very make world still own see men work long get here between both life
being under never day same another know while last might us great old year off come since
against go came right used take three
""".split()


def text_of(seed: int, words: int) -> str:
    """Pseudo-English with the features that make byte counting hard."""
    rng = random.Random(seed)
    out = [rng.choice(WORDS) for _ in range(words)]
    for mark in ("  ", "\n", "\t", ", ", " é", " 🙂", " e\u0301", ' "', "\n\n    "):
        out.insert(rng.randrange(len(out)), mark)
    return " ".join(out) + ".\n"


def prepare_tiny(files, out):
    """Runs data/prepare_text.py: 384 pieces, the first 10 documents to validate, several shards."""
    options = "--name tiny --vocab-size 384 --val-docs 10 --shard-tokens 20000".split()
    run_python("data/prepare_text.py", "--source", *files, "--out", out, *options, cwd=out)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The folder of a tokenizer of 384 pieces and of shards with some 60 documents."""
    root = tmp_path_factory.mktemp("data")
    files = []
    for i in range(60):
        files.append(root / f"doc{i:02d}.txt")
        files[-1].write_text(text_of(i, 300), encoding="utf-8")
    prepare_tiny(files, root)
    return root


@pytest.fixture(scope="session")
def tiny_env(dataset):
    """Environment of a run that takes seconds."""
    return dict(
        DATA_PATH=str(dataset / "datasets/tiny_sp384"),
        TOKENIZER_PATH=str(dataset / "tokenizers/tiny_384_bpe.model"),
        VOCAB_SIZE="384",
        NUM_LAYERS="3",
        MODEL_DIM="32",
        NUM_HEADS="4",
        NUM_KV_HEADS="2",
        TRAIN_SEQ_LEN="32",
        TRAIN_BATCH_TOKENS="512",
        ITERATIONS="12",
        WARMDOWN_ITERS="6",
        WARMUP_STEPS="0",
        MAX_WALLCLOCK_SECONDS="0",
        TRAIN_LOG_EVERY="1",
        VAL_LOSS_EVERY="0",
        EVAL_MAX_SEQS="16",
        VAL_BATCH_SIZE="2048",
        COMPUTE_DTYPE="float32",
        SCORES="nelbo",
    )


def clean_env(**extra) -> dict:
    """The environment without anything that configures the script."""
    known = {spec.name.upper() for spec in tm.dataclasses.fields(tm.Hyperparameters)}
    known |= {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    return {name: value for name, value in os.environ.items() if name not in known} | extra


def run_python(*arguments, cwd, check=True, **extra) -> subprocess.CompletedProcess:
    """Runs `python <script of this project> …` in `cwd`; environment variables as keywords."""
    script, *rest = map(str, arguments)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        env=clean_env(**extra),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def tool(monkeypatch, capsys):
    """Calls main() of a tool in this process; its exit status, stdout and stderr."""

    def call(module, *arguments) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            module.main()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return call


@pytest.fixture
def script(monkeypatch, capfd):
    """Calls main() of train_mdlm.py in this process, with variables as keywords; as `tool` does."""

    def call(*arguments, **env) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["train_mdlm.py", *arguments])
        monkeypatch.setattr(os, "environ", clean_env(**env))
        monkeypatch.setattr(tm, "on_signals", lambda handler: None)
        capfd.readouterr()
        status = 0
        try:
            tm.main()
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return call


def body_of(log: Path) -> str:
    """A log without the script's source, which holds the same words."""
    separator = "\n" + "=" * 100 + "\n"
    return log.read_text(encoding="utf-8").rpartition(separator)[2] if log.exists() else ""


def refused(done, *parts) -> None:
    """One line, without a traceback, that has all the parts."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


class Lines(tm.Log):
    """A log that keeps its lines."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __call__(self, line, **options):
        self.lines.append(line)

    def found(self, pattern):
        return re.findall(pattern, "\n".join(self.lines), re.MULTILINE)


def torchrun(*options, cwd, **extra) -> subprocess.Popen:
    """Starts `torchrun <options> train_mdlm.py` in `cwd`, one thread a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train_mdlm.py")],
        cwd=cwd,
        env=clean_env(OMP_NUM_THREADS="1", **extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def tiny_hp(**overrides) -> tm.Hyperparameters:
    """Small enough to enumerate every sequence and every mask."""
    shape = dict(vocab_size=3, train_seq_len=4, train_batch_tokens=16)
    widths = dict(num_layers=3, model_dim=8, num_heads=2, num_kv_heads=1)
    return tm.Hyperparameters(**(shape | widths | overrides))


def random_model(hp: tm.Hyperparameters, seed: int = 0, scale: float = 0.5) -> tm.Model:
    """A model none of whose parameters is at its initial value."""
    model = tm.build_model(hp)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))
    return model


def byte_tables(hp: tm.Hyperparameters) -> tm.ByteTables:
    """Of the tokenizer of `hp`."""
    tokenizer = tm.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    return tm.build_sentencepiece_luts(tokenizer, hp.vocab_size)


def val_split(hp: tm.Hyperparameters) -> tm.Split:
    """The validation split of `hp`, unchecked."""
    return tm.Split(tm.TokenStream(hp.data_path, "val"), byte_tables(hp))
