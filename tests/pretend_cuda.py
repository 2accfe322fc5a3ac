"""The script as if on CUDA, on CPUs: a program of its own, with the library of tools/absent_gpu.py.

    LD_PRELOAD=absent_gpu.so python pretend_cuda.py RUNS RANK PROCESSES

Tensors say that they are on cuda:0 and hold CPU data. What a GPU refuses is refused: operands, or a
generator and its tensor, on two devices. What makes the host wait, copies between the devices, and
collectives are written down in the order in which they happen, with a mark where a step begins.

RUNS is a JSON file with a list of runs, each with a name, a folder, the environment, edits of the
source, and the step before which it stops, if any. Each run writes its events, and the error that
ended it, to <name>.<rank>.json in its folder.
"""

import datetime
import functools
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import absent_gpu  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten = torch.ops.aten
EVENTS = []
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
real_init_process_group = dist.init_process_group
OTHER_SECONDS = 10  # that a process waits for the other one to do the same

# ---- Tensors


class Pretended(torch.Tensor):
    """A tensor that says it is on the device; `held` is where its numbers are."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=absent_gpu.DEVICE,
        )

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        assert (value.shape, value.stride()) == (self.shape, self.stride())
        self.held = value.held

    def tolist(self):
        EVENTS.append("host read tolist")
        return self.held.tolist()

    def __format__(self, spec):
        EVENTS.append("host read format")
        return format(self.held, spec)


def tensors_in(value) -> list[torch.Tensor]:
    """Those in arguments of an operation, which may be in lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def with_tensors(function, value):
    """`value` with function(tensor) in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(function, part) for part in value)
    return value


def held(value):
    return with_tensors(lambda x: x.held if isinstance(x, Pretended) else x, value)


# ---- Operations

COPIES = {aten.copy_.default, aten._to_copy.default}
# An index may be on the CPU, but then it is copied; a mask may not, because its size is read.
INDEXED = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
HOST_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}


def refuse(operation, tensors: list) -> None:
    """RuntimeError if these operands are on two devices; numbers may be."""
    if operation in COPIES:
        return
    is_pointwise = torch.Tag.pointwise in operation.tags
    here = [x for x in tensors if not isinstance(x, Pretended)]
    wrong = [x for x in here if x.dim() or not is_pointwise]
    if wrong and len(here) < len(tensors):
        shapes = [f"{x.device.type} {tuple(x.shape)}" for x in tensors]
        raise RuntimeError(f"operands on two devices: {operation} of {', '.join(shapes)}")


def note(operation, args: tuple, kwargs: dict) -> None:
    """Writes down what makes the host wait, and copies between the devices."""
    on_device = isinstance(args[0], Pretended) if args else False
    if operation in HOST_READS and on_device:
        EVENTS.append(f"host read {operation}")
    if operation in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1]):
        EVENTS.append(f"host read {operation} of a mask")
    if operation is aten._to_copy.default and "device" in kwargs:
        target = torch.device(kwargs["device"]).type
        if on_device and target == "cpu":
            EVENTS.append("copy to the host")
        if not on_device and target == "cuda":
            own = PINNED.pop(id(args[0]), None)
            free = own is not None and args[0].is_contiguous() and kwargs.get("non_blocking")
            EVENTS.append(f"{'free' if free else 'waiting'} copy to the device")
    if operation is aten.copy_.default and on_device != isinstance(args[1], Pretended):
        EVENTS.append("waiting copy between the devices")


@functools.cache
def on_the_cpu(operation):
    """The operation, or what it is made of if only GPUs have it as one."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CPU"):
        return operation
    return torch._decomp.decomposition_table.get(operation, operation)


def dispatch(operation, args: tuple, kwargs: dict):
    """Does it with the numbers; the result says that it is on the device if the operands do."""
    tensors = tensors_in([*args, *kwargs.values()])  # of which one may be `out`
    refuse(operation, tensors_in((args[0], *args[2:])) if operation in INDEXED else tensors)
    note(operation, args, kwargs)
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        to_device = torch.device(wanted).type == "cuda"
    elif operation is aten.copy_.default:
        to_device = isinstance(args[0], Pretended)
    else:
        to_device = any(isinstance(x, Pretended) for x in tensors)
    options = {name: held(value) for name, value in kwargs.items()}
    result = on_the_cpu(operation)(*held(args), **options)
    if not to_device:
        return result
    known = {id(x.held): x for x in tensors if isinstance(x, Pretended)}  # changed in place

    def pretended(tensor):
        return known[id(tensor)] if id(tensor) in known else Pretended(tensor)

    return with_tensors(pretended, result)


class Device(TorchDispatchMode):
    """Takes what makes a tensor on the device, too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        asked = wanted is not None and torch.device(wanted).type == "cuda"
        if asked or any(isinstance(x, Pretended) for x in tensors_in(args)):
            return dispatch(operation, args, kwargs)
        return operation(*args, **kwargs)


def rand(seed: int, *size, **options):
    generator = torch.Generator().manual_seed(seed)
    return Pretended(torch.empty(*size, **options).uniform_(generator=generator))


PINNED = {}  # by id, tensors that are waiting for their copy


def pin_memory(tensor):
    """As CUDA does: with the strides of the original."""
    pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    pinned.copy_(tensor)
    PINNED[id(pinned)] = pinned
    return pinned


# ---- Processes


def agree(what: str) -> None:
    """RuntimeError unless the other process begins the same collective."""
    store = dist.distributed_c10d._get_default_store()
    number = sum(event.startswith("collective") for event in EVENTS)
    store.set(f"{number}/{dist.get_rank()}", what)
    other = f"{number}/{1 - dist.get_rank()}"
    try:
        store.wait([other], datetime.timedelta(seconds=OTHER_SECONDS))
        found = store.get(other).decode()
    except dist.DistError:
        found = "nothing"
    if found != what:
        raise RuntimeError(f"collective {number} is {what} here and {found} on the other process")


def watched(collective):
    """A collective that is written down, and takes tensors of the device."""

    def run(*args, **kwargs):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        wrong = [tuple(x.shape) for x in tensors if not x.is_contiguous()]
        if wrong:
            raise RuntimeError(f"{collective.__name__} of {wrong}, which are not contiguous")
        shapes = [f"{x.dtype} {tuple(x.shape)}" for x in tensors]
        where = "nccl" if isinstance(tensors[0], Pretended) else "gloo"
        what = f"{collective.__name__} {where} {', '.join(shapes)}"
        EVENTS.append(f"collective {what}")
        agree(what)
        return collective(*held(args), **kwargs)

    return run


def join_at(folder: Path, rank: int, processes: int) -> None:
    """Where the script's group meets, instead of what torchrun would say."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))

    def init_process_group(backend):
        assert backend == "cpu:gloo,cuda:nccl", backend
        meeting = f"file://{folder / 'group'}"
        real_init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)

    dist.init_process_group = init_process_group


# ---- Runs


def edited_script(edits: list) -> types.ModuleType:
    """The script after edits (old, new); each old text is there once."""
    path = ROOT / "train_mdlm.py"
    source = path.read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    script = types.ModuleType("pretended_script")
    script.__file__ = str(path)
    sys.modules[script.__name__] = script  # for its dataclasses
    exec(compile(source, path, "exec"), script.__dict__)
    return script


def watch_steps(script: types.ModuleType, stop_before: int | None) -> None:
    real_step = script.Trainer.step

    def step(trainer, number, scale):
        if number == stop_before:
            raise KeyboardInterrupt
        EVENTS.append("step")
        return real_step(trainer, number, scale)

    script.Trainer.step = step
    script.on_signals = lambda handler: None


def do_run(run: dict, rank: int, processes: int) -> None:
    EVENTS.clear()
    folder = Path(run["folder"])
    os.chdir(folder)
    script = edited_script(run["edits"])
    absent_gpu.seed_on_device(script)
    watch_steps(script, run["stop_before"])
    if processes > 1:
        join_at(folder, rank, processes)
    error = ""
    try:
        with Device():
            script.run({**run["env"], "RANK": str(rank)})
    except (Exception, KeyboardInterrupt) as caught:
        error = f"{type(caught).__name__}: {caught}"
    if dist.is_initialized():
        dist.destroy_process_group()
    out = folder / f"{run['name']}.{rank}.json"
    out.write_text(json.dumps(dict(events=EVENTS, error=error)))


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    absent_gpu.install()
    absent_gpu.rand_on_device(rand)
    torch.Tensor.pin_memory = pin_memory
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") goes by the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name in COLLECTIVES:
        setattr(dist, name, watched(getattr(dist, name)))
    for run in runs:
        do_run(run, rank=int(sys.argv[2]), processes=int(sys.argv[3]))


if __name__ == "__main__":
    main()
