"""What the tools have in common: where the script is, one-line errors, artifacts, data, pictures.

A tool imports this file before `train_mdlm`, which is then found wherever the tool is started.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_mdlm as tm  # noqa: E402
from train_mdlm import InputError  # noqa: E402

DPI = 110  # of pictures


# ---- Command lines


def run_tool(main: Callable[[], None]) -> Callable[[], None]:
    """Decorates main(): what the user got wrong, or Ctrl-C, is one line on stderr and status 2."""
    name = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except (InputError, OSError) as error:
            message = tm.explain(error)
        except KeyboardInterrupt:
            message = "stopped by Ctrl-C"
        else:
            return
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)

    return run


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with `description`, the docstring of a tool, as it stands."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    text = "SentencePiece model; default: TOKENIZER_PATH, or that of the artifact's preset"
    parser.add_argument("--tokenizer", help=text)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options --data and --tokenizer, which `with_paths` understands."""
    text = "folder with the shards; default: DATA_PATH, or that of the artifact's preset"
    parser.add_argument("--data", help=text)
    add_tokenizer_option(parser)


def require(package: str) -> ModuleType:
    """A package that only requirements-dev.txt brings; InputError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        missing = package.partition(".")[0]
        message = f"the package {missing} is missing: pip install -r requirements-dev.txt"
        raise InputError(message) from None


# ---- Artifacts and data


def device() -> torch.device:
    """Where models run: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_paths(
    hp: tm.Hyperparameters, data: str | None = None, tokenizer: str | None = None
) -> tm.Hyperparameters:
    """`hp` with the paths given here, else in DATA_PATH and TOKENIZER_PATH, else its own."""
    return dataclasses.replace(
        hp,
        data_path=data or os.environ.get("DATA_PATH") or hp.data_path,
        tokenizer_path=tokenizer or os.environ.get("TOKENIZER_PATH") or hp.tokenizer_path,
    )


def load_model(
    artifact: Path, data: str | None = None, tokenizer: str | None = None
) -> tuple[tm.Model, tm.Hyperparameters]:
    """The model of an artifact, on the device, and its hyperparameters `with_paths`."""
    model, hp = tm.load_artifact(artifact)
    return model.on(device()), with_paths(hp, data, tokenizer)


def load_tokenizer(hp: tm.Hyperparameters) -> tuple[object, tm.ByteTables]:
    """The tokenizer that `hp` names, and its byte tables, on the device."""
    tokenizer = tm.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    return tokenizer, tm.build_sentencepiece_luts(tokenizer, hp.vocab_size, device())


def open_validation(hp: tm.Hyperparameters) -> tm.Split:
    """The validation split that `hp` names, checked, with byte tables on the device."""
    return tm.open_validation(hp, *load_tokenizer(hp))


# ---- Pictures


def new_figure(width: float, height: float):
    """An empty matplotlib figure, in inches."""
    figure_class = require("matplotlib.figure").Figure
    return figure_class(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    """Writes a picture in the format that its name ends in; InputError if that fails."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix[1:] or "png", dpi=DPI)
    except ValueError as error:
        raise InputError(f"{path}: the picture cannot be written: {error}") from None
    tm.write_file(path, picture.getvalue())
