"""A CUDA device that is not there.

`library` compiles absent_gpu.cpp with g++. A child process that was started with `environment` has
loaded it before torch; `install` then makes torch.cuda of that process describe a GPU. Tensors on
this device have to come from elsewhere: fake ones without data in tools/lowering.py, ones that
hold CPU data in the tests.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import common
import torch

from train_mdlm import InputError

DEVICE = torch.device("cuda", 0)
SOURCE = common.TOOLS / "absent_gpu.cpp"
PROPERTIES = dict(  # of an H100, as far as the compiler asks
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85_028_896_768,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    warp_size=32,
    L2_cache_size=50 << 20,
    clock_rate=1_980_000,
)


def compiler() -> str | None:
    """The path of g++, or of what CXX names; None where there is none, or no Linux."""
    return shutil.which(os.environ.get("CXX", "g++")) if sys.platform == "linux" else None


def library(folder: Path) -> Path:
    """Compiles absent_gpu.cpp into `folder`, in some seconds; InputError without a compiler."""
    if not compiler():
        raise InputError("needs a C++ compiler on Linux: install g++, or name one with CXX")
    torch_folder = Path(torch.__file__).parent
    libraries = torch_folder / "lib"
    out = folder / "absent_gpu.so"
    command = [compiler(), "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", out]
    command += [f"-I{torch_folder / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise InputError(f"{SOURCE.name} does not compile with torch {torch.__version__}: {reason}")
    return out


def environment(compiled: Path) -> dict[str, str]:
    """Of a child process that has the device."""
    return {**os.environ, "LD_PRELOAD": str(compiled)}


class DeviceGenerator:
    """Stands for a torch.Generator of the device. Only torch.rand takes it."""

    def __init__(self, seed: int):
        self.device = DEVICE
        self.seed = seed


def seed_on_device(script: ModuleType) -> None:
    """`script.seeded` makes such a generator where it is asked for one of the device."""
    real_seeded = script.seeded

    def seeded(device, *key):
        generator = real_seeded("cpu", *key)
        on_device = torch.device(device).type == DEVICE.type
        return DeviceGenerator(generator.initial_seed()) if on_device else generator

    script.seeded = seeded


def rand_on_device(rand: Callable) -> None:
    """torch.rand with a generator of the device is rand(seed, *size, **options)."""
    real_rand = torch.rand

    def drawn(*size, generator=None, device=None, **options):
        if generator is not None and torch.device(device or "cpu").type != generator.device.type:
            raise RuntimeError(f"a tensor on {device} of a generator on {generator.device}")
        if isinstance(generator, DeviceGenerator):
            return rand(generator.seed, *size, **options)
        return real_rand(*size, generator=generator, device=device, **options)

    torch.rand = drawn


class Event:
    """Nothing to wait for."""

    def synchronize(self) -> None:
        pass

    def record(self) -> None:
        pass


def choose_attention(backend: int) -> None:
    """What `scaled_dot_product_attention` is on the device: a torch.nn.attention.SDPBackend."""
    ctypes.CDLL(None).choose_attention(ctypes.c_int64(backend))


def install() -> None:
    """torch.cuda says that there are eight such devices, this process's among them."""
    os.environ.pop("LD_PRELOAD", None)  # for the programs that this one starts
    ctypes.CDLL(None).take_over()
    properties = SimpleNamespace(**PROPERTIES)
    cuda = torch.cuda  # a function for each name: the compiler has a rule for each function
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 8
    cuda.current_device = lambda: 0
    cuda._get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    cuda.get_device_name = lambda device=None: properties.name
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.mem_get_info = lambda device=None: (properties.total_memory,) * 2
    cuda.max_memory_allocated = lambda device=None: 0
    cuda.max_memory_reserved = lambda device=None: 0
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda._lazy_init = lambda: None
    cuda.manual_seed_all = lambda seed: None
    cuda.Event = Event
