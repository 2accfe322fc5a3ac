"""Counts what a training step of the script does on a GPU, on a machine that has none.

    python tools/step_cost.py golf      # prints what is counted here, with the time it takes

A child process runs `Trainer.step` on fake tensors: they have a shape, a dtype and a device, and no
data. The compiled loss goes through Inductor as for an H100, up to the source of its kernels. What
is not compiled is counted operation by operation.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import absent_gpu
import common
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_mdlm as tm
from train_mdlm import InputError


class Kernel(NamedTuple):
    """What is started on the device at once."""

    part: str  # of the step: batch, loss, gradients, optimizer, average
    kind: str  # matrix product, attention, flex attention, fused, scatter, eager, copy, collective
    name: str
    compiled: bool  # started by code of Inductor
    flops: int  # of matrix products and attention, without padding
    nbytes: int  # read and written; sent by a collective
    head_dim: int  # of attention, else 0


class Counts(NamedTuple):
    """A step of one process."""

    kernels: collections.Counter[Kernel]  # how often each is started
    graphs: dict[str, int]  # compiled graphs by part
    peak_bytes: int  # allocated at most
    host_reads: int  # values of the device that the host waits for
    tokens: int  # of this process
    micro_batches: int


class Request(NamedTuple):
    """A step to be counted."""

    knobs: dict  # of the hyperparameters
    processes: int  # that share a batch
    scored: bool = False  # whether a pass of scoring goes through the compiler too


# ---- In the parent


def count_step(hp: tm.Hyperparameters, processes: int) -> Counts:
    """Of one of so many processes; InputError if g++ or triton is missing."""
    common.require("triton")
    with tempfile.TemporaryDirectory() as folder:
        library = absent_gpu.library(Path(folder))
        [counts] = count_steps([Request(vars(hp), processes)], library)
    return counts


def count_steps(requests: list[Request], library: Path) -> list[Counts]:
    """All of them in one child process."""
    command = [sys.executable, __file__, json.dumps(requests)]
    environment = absent_gpu.environment(library)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        *_, reason = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise InputError(reason.removeprefix("lowering.py: error: "))
    found = []
    for counts in json.loads(done.stdout):
        kernels = {Kernel(*kernel): times for *kernel, times in counts.pop("kernels")}
        found.append(Counts(collections.Counter(kernels), **counts))
    return found


# ---- In the child: recording


class Memory:
    """Bytes of the device that tensors hold."""

    def __init__(self):
        self.live_bytes = 0
        self.peak_bytes = 0
        self.storages = weakref.WeakSet()

    def hold(self, tensors: list) -> None:
        """Until the last tensor of each storage is gone."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                storage = tensor.untyped_storage()
                if storage not in self.storages:
                    self.storages.add(storage)
                    self.live_bytes += storage.nbytes()
                    weakref.finalize(storage, self.free, storage.nbytes())
        self.reach(self.live_bytes)

    def free(self, nbytes: int) -> None:
        self.live_bytes -= nbytes

    def reach(self, nbytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, nbytes)


class Recorder:
    """What happens on the device in a step of `hp`, shared by so many processes."""

    def __init__(self):
        self.paused = False

    def begin(self, hp: tm.Hyperparameters, processes: int) -> None:
        self.hp = hp
        self.processes = processes
        self.density = mask_density(hp)
        self.part = ""
        self.kernels = collections.Counter()
        self.graphs = collections.Counter()
        self.host_reads = 0
        self.memory = Memory()

    def within(self, part: str, work: Callable) -> Callable:
        """`work`, which is this part of the step."""

        def run(*args, **kwargs):
            before, self.part = self.part, part
            result = work(*args, **kwargs)
            self.part = before
            return result

        return run

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """While the compiler tries things."""
        before, self.paused = self.paused, True
        yield
        self.paused = before

    def add(self, kind: str, name: str, flops=0, nbytes=0, head_dim=0, compiled=False) -> None:
        if kind == "attention" and (self.hp.causal or self.hp.block_size):
            flops /= 2
        if kind == "flex attention":
            flops *= self.density
        kernel = Kernel(self.part, kind, name, compiled, int(flops), int(nbytes), head_dim)
        self.kernels[kernel] += 1

    def call(self, graph: Graph) -> list:
        """Notes a call of a compiled graph; its results, without data."""
        for kernel in graph.kernels:
            self.add(**kernel, compiled=True)
        self.memory.reach(self.memory.live_bytes + graph.more_bytes)
        with self.pause(), graph.fake_mode:
            results = [result and result() for result in graph.results]
        self.memory.hold(results)
        return results


def mask_density(hp: tm.Hyperparameters) -> float:
    """Share of the tiles that attention with a mask for blocks works on; without a mask all."""
    if not hp.block_size:
        return 1.0
    _, _, columns = tm.draw_noise(hp, tm.seeded("cpu", hp.seed, "train", 0))
    mask = tm.block_view(hp, hp.block_size, columns, hp.train_seq_len).mask
    tiles = tm.create_block_mask(
        lambda b, h, q, k: mask[q, k], None, None, *mask.shape, device="cpu"
    )
    return 1 - tiles.sparsity() / 100


# ---- In the child: operations that are not compiled

aten = torch.ops.aten
CUDNN_ATTENTION = torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
NO_KERNEL = {  # besides views
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten.detach.default,
    torch.ops.prim.device.default,
}
READ_IN_PART = {  # only as much as there is in the result
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
}
WRITES_ONLY = {aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.uniform_.default}
HOST_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


def stored_bytes(tensor: torch.Tensor) -> int:
    """Without the repetitions of an expanded tensor."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    elements = math.prod(size for size, stride in sizes if stride)
    return elements * tensor.element_size()


def arithmetic(packet, shapes: list) -> int:
    """FLOPs of an operation on matrices of these shapes; 0 for others."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry[packet](*shapes) if packet in flop_registry else 0


class Eager(TorchDispatchMode):
    """Counts operations on the device; lets all of them happen."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # so that the compiler works under this mode

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not self.recorder.paused:
            self.count(operation, tree_leaves((args, kwargs)), tree_leaves(result))
        return result

    def count(self, operation, given: list, results: list) -> None:
        recorder = self.recorder
        given = [x for x in given if isinstance(x, torch.Tensor)]
        results = [x for x in results if isinstance(x, torch.Tensor)]
        recorder.memory.hold(results)
        if not any(x.is_cuda for x in given + results):
            return
        if operation in HOST_READS:
            recorder.host_reads += 1
        if operation in NO_KERNEL or operation.is_view:
            return
        if len({x.device.type for x in given + results if x.dim()}) > 1:
            recorder.add("copy", str(operation), nbytes=sum(map(stored_bytes, results)))
            return
        written = sum(map(stored_bytes, results))
        read = sum(map(stored_bytes, given))
        if operation in READ_IN_PART:
            read = written + sum(map(stored_bytes, given[1:]))
        if operation in WRITES_ONLY:
            read -= written
        packet = operation.overloadpacket
        flops = arithmetic(packet, [x.shape for x in given])
        kind, head_dim = "matrix product" if flops else "eager", 0
        if "attention" in str(packet):
            kind, head_dim = "attention", given[0].shape[-1]
        recorder.add(kind, str(operation), flops, read + written, head_dim)


# ---- In the child: compiled graphs


class Graph:
    """A graph that Inductor has scheduled: its kernels, memory and results."""

    def __init__(self, lowered, fake_mode):
        from torch._inductor import scheduler
        from torch._inductor.memory import estimate_peak_memory, get_freeable_input_buf

        self.fake_mode = fake_mode
        nodes = lowered.scheduler.nodes
        inputs = get_freeable_input_buf(nodes, set(lowered.graph_inputs))
        peak, _ = estimate_peak_memory(nodes, inputs, set(lowered.get_output_names()))
        freed = sum(buffer.mpi_buffer.size_free for buffer in inputs.values())
        self.more_bytes = peak - freed  # than before the call, at most
        self.kernels = []  # arguments of `Recorder.add`
        for node in nodes:
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                if getattr(node.node, "python_kernel_name", None):  # else one of several results
                    self.kernels.append(library_call(node))
            elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                self.kernels.append(triton_kernel(node, lowered.is_backward))
        self.results = [
            self.result(output) if output.maybe_get_size() is not None else None
            for output in lowered.graph_outputs
        ]

    @staticmethod
    def result(output) -> Callable[[], torch.Tensor]:
        """Makes it without data."""
        sizes = [int(size) for size in output.get_size()]
        strides = [int(stride) for stride in output.get_stride()]
        options = dict(dtype=output.get_dtype(), device=output.get_device())
        return functools.partial(torch.empty_strided, sizes, strides, **options)


def sizes_of(node) -> list[list[int]]:
    """Of its inputs."""
    return [[int(size) for size in tensor.get_size()] for tensor in node.inputs]


def library_call(node) -> dict:
    """A matrix product, attention, or another operation that Inductor does not write itself."""
    call, name = node.node, node.node.python_kernel_name
    shapes = sizes_of(call)
    found = dict(kind="fused", name=name, nbytes=node.get_read_write_buffers_sizes())
    if "attention" in name:
        flops = arithmetic(call.op_overload.overloadpacket, shapes)
        found |= dict(kind="attention", flops=flops, head_dim=shapes[0][-1])
    elif re.search("(^|_|[.])(add|badd)?b?mm$", name):
        found |= dict(kind="matrix product", flops=2 * math.prod(shapes[-2]) * shapes[-1][-1])
    elif "index" in name:
        found |= dict(kind="scatter")
    return found


def triton_kernel(node, backward: bool) -> dict:
    found = dict(kind="fused", name="triton", nbytes=node.get_read_write_buffers_sizes())
    if node.is_template():  # the only one is flex attention
        q, k, *_ = sizes_of(node.get_template_node())
        products = 7 if backward else 2  # two of the five are done twice
        flops = products * 2 * math.prod(q) * k[-2]
        found |= dict(kind="flex attention", name="flex_attention", flops=flops, head_dim=q[-1])
    elif any(getattr(write, "mode", None) == "atomic_add" for write in node.read_writes.writes):
        found |= dict(kind="scatter")
    return found


def compile_without_device(recorder: Recorder, fake_mode) -> None:
    """torch.compile goes through Inductor for the absent device from now on, as far as the source
    of the kernels; a call of what is compiled makes results without data."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    def module(lowered) -> types.SimpleNamespace:
        lowered.codegen()
        graph = Graph(lowered, fake_mode)
        recorder.graphs[recorder.part] += 1

        def call(inputs: list) -> list:
            inputs.clear()
            return recorder.call(graph)

        return types.SimpleNamespace(call=call)

    def inner(*args, **options):
        with recorder.pause():
            return compile_fx.compile_fx_inner(*args, **options)

    def backend(graph_module, inputs):
        return compile_fx.compile_fx(graph_module, inputs, inner_compile=inner)

    real_compile = torch.compile

    def compiled(function, **options):
        run = real_compile(function, backend=backend, **options)

        def paused(*args, **kwargs):
            with recorder.pause():
                return run(*args, **kwargs)

        return paused

    torch.compile, GraphLowering.compile_to_module = compiled, module


def set_up_compiler() -> None:
    """What Inductor and Triton ask of a device."""
    import torch._inductor.compile_fx  # looks at torch.cuda as it is
    import torch._inductor.config as config
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch.utils._triton as triton_support
    import triton
    from triton.backends.compiler import GPUTarget

    absent_gpu.install()
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", lambda *device: 0)
    torch._C._cuda_getDeviceCount = lambda: 1
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
        module.set_rng_state = lambda state, device="cuda": None
    torch.version.cuda = "13.0"
    fuse_attention._sfdp_init = lambda *args, **kwargs: None
    triton_support.triton_hash_with_backend = lambda: "absent"
    limits = dict(max_shared_mem=absent_gpu.PROPERTIES["shared_memory_per_block_optin"])
    limits |= dict(multiprocessor_count=absent_gpu.PROPERTIES["multi_processor_count"])
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
    )
    triton.runtime.driver.set_active(driver)
    config.compile_threads = 1
    config.fx_graph_cache = config.fx_graph_remote_cache = False
    config.shape_padding = config.joint_graph_constant_folding = False


# ---- In the child: the step


class Windows:
    """A stream of tokens without data."""

    total = 10**9

    def windows(self, numbers: Sequence[int], length: int):
        return torch.zeros(len(numbers), 1 + length, dtype=torch.int64)


def watch(recorder: Recorder) -> None:
    """Makes the script say where it is, and think that there are other processes."""
    tm.world_size = lambda: recorder.processes
    tm.training_batch = recorder.within("batch", tm.training_batch)

    def collective(operation, *arguments, **options):
        if recorder.processes > 1:
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            recorder.add("collective", operation.__name__, nbytes=max(map(stored_bytes, tensors)))

    tm.run_collective = collective


def outside_of_fakes(module: types.ModuleType, name: str) -> None:
    """Its function of that name works with numbers, not on the device."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    real = getattr(module, name)

    def run(*args):
        with _disable_current_modes(), unset_fake_temporarily():
            return real(*args)

    setattr(module, name, run)


def build_on_device() -> None:
    """Fake parameters cannot move, so they are made where they belong."""
    real_build = tm.build_model

    def build(hp):
        with absent_gpu.DEVICE:
            return real_build(hp)

    tm.build_model = build
    torch.nn.Module.to = lambda module, device: module


def count_one(recorder: Recorder, hp: tm.Hyperparameters, processes: int) -> Counts:
    recorder.begin(hp, processes)
    torch._dynamo.reset()
    absent_gpu.choose_attention(0 if hp.compute_dtype == "float32" else CUDNN_ATTENTION)
    trainer = tm.Trainer(hp, Windows(), absent_gpu.DEVICE, tm.Log())
    recorder.kernels.clear()  # what made the model
    trainer.loss = recorder.within("loss", trainer.loss)
    trainer.optimizer.step = recorder.within("optimizer", trainer.optimizer.step)
    recorder.within("gradients", trainer.step)(0, 1.0)
    if hp.ema_decay:
        recorder.within("average", trainer.optimizer.update_average)()
    return Counts(
        kernels=recorder.kernels,
        graphs=recorder.graphs,
        peak_bytes=recorder.memory.peak_bytes,
        host_reads=recorder.host_reads,
        tokens=hp.train_batch_tokens // processes,
        micro_batches=len(trainer.micros),
    )


class Done(Exception):
    """The pass is lowered; nothing is added up."""


def lower_score(hp: tm.Hyperparameters) -> None:
    """A pass of the model as `tm.score_model` compiles it, with two masked positions."""

    def one_pass(name, model, *others):
        shape = (2, 1 + hp.train_seq_len)
        window = torch.zeros(shape, dtype=torch.int64, device=absent_gpu.DEVICE)
        z, at, view = window[:, 1:], torch.zeros_like(window[:, 0]), None
        if hp.block_size:
            z, at, view = tm.beside_clean(hp, hp.block_size, z, at, window)
        with torch.no_grad():
            model.hidden(z, None, at, view)
        raise Done

    luts = types.SimpleNamespace(base_bytes=torch.zeros(1, device=absent_gpu.DEVICE))
    artifact = types.SimpleNamespace(model=tm.build_model(hp), label="")
    real_windows, tm.score_windows = tm.score_windows, one_pass
    with contextlib.suppress(Done):
        tm.score_model(artifact, hp, types.SimpleNamespace(luts=luts), tm.Log())
    tm.score_windows = real_windows


def count_in_child(requests: list) -> Iterator[Counts]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    set_up_compiler()
    absent_gpu.seed_on_device(tm)
    absent_gpu.rand_on_device(
        lambda seed, *size: torch.empty(*size, device=absent_gpu.DEVICE).uniform_()
    )
    torch.Tensor.pin_memory = lambda tensor: tensor
    outside_of_fakes(tm, "scored_capacity")
    outside_of_fakes(sys.modules[__name__], "mask_density")
    build_on_device()
    fake_mode, recorder = FakeTensorMode(), Recorder()
    compile_without_device(recorder, fake_mode)
    watch(recorder)
    for knobs, processes, scored in requests:
        hp = tm.Hyperparameters(**knobs)
        with fake_mode, Eager(recorder):
            counts = count_one(recorder, hp, processes)
            if scored:
                recorder.kernels = collections.Counter()  # they are not of the step
                recorder.within("score", lower_score)(hp)
        yield counts


@common.run_tool
def main() -> None:
    found = []
    for counts in count_in_child(json.loads(sys.argv[1])):
        kernels = [[*kernel, times] for kernel, times in counts.kernels.items()]
        found.append(counts._replace(kernels=kernels)._asdict())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
