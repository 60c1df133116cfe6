"""The processes that torchrun started: who this one is, what all of them agree on, and what they hand each other.

Without torchrun there is one process, and everything here gives back what it was given.
"""

import atexit
import functools
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor, distributed, nn

# What joined() needs of torchrun's environment.
TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


@contextmanager
def joined(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Joins the processes that torchrun started: gloo between CPUs, NCCL between GPUs where each has its own.

    `timeout` is how long one waits for another. ValueError where torchrun's environment is incomplete. Where the
    group is already joined, it is used and left as it is. After an error it stays joined: NCCL would wait for the
    others to leave.
    """
    if distributed.is_initialized() or "WORLD_SIZE" not in os.environ:
        yield
        return
    _check_environment()
    _take_gpu()
    # Its functions take the group of the moment for a default, and would keep it, and gloo's threads, past its end.
    import torch.distributed.nn.functional  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if enough_gpus() else "gloo"
    store, number, count = next(distributed.rendezvous("env://", timeout=timeout))
    store = _of_the_living(store, number, count, timeout)
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    yield
    distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code; among several processes without Python's own end.

    A gloo thread frees the tensor it was handed last, if need be after the exchange. Where Python is ending by then,
    it is killed for that, and the process aborts ("terminate called without an active exception"). The threads end with
    the group, which a process that fails does not leave and sharded tensors keep.
    """
    if "WORLD_SIZE" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def enough_gpus() -> bool:
    """Whether each of the processes that torchrun started on this machine has a GPU of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()


def _check_environment() -> None:
    alone = os.environ["WORLD_SIZE"] == "1"
    needed = [name for name in TORCHRUN if not (alone and name.startswith("LOCAL_"))]
    if missing := [name for name in needed if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is set, and {', '.join(missing)} not: let torchrun start the processes")


def _take_gpu() -> None:
    """Makes the GPU that is this process's own, if there is one, the current one."""
    if (local := int(os.environ.get("LOCAL_RANK", 0))) < torch.cuda.device_count():
        torch.cuda.set_device(local)


def _of_the_living(store: distributed.Store, number: int, count: int, timeout: timedelta) -> distributed.Store:
    """A part of the store in which dead processes have left nothing.

    torchrun keeps one store over its restarts, which each machine counts for itself. So the first process names a new
    part, the others put new words there, and go on when it has seen theirs.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    others = [f"{word}/{other}" for other in range(1, count)]
    if number == 0:
        store.set("part", word)
    while time.monotonic() < end:  # asks, for what waits in the store hears no signal
        if number == 0:
            if all(store.check([other]) for other in others):
                store.set(f"{word}/seen", b" ".join(map(store.get, others)))
                return distributed.PrefixStore(word, store)
        elif store.check(["part"]):
            part = store.get("part").decode()  # perhaps that of a dead process
            store.set(f"{part}/{number}", word)
            if store.check([f"{part}/seen"]) and word in store.get(f"{part}/seen").decode():
                return distributed.PrefixStore(part, store)
        time.sleep(0.05)
    raise RuntimeError(f"process {number} of {count} waited {timeout} for the others, and not all came")


def check_joined() -> None:
    """RuntimeError where torchrun started several processes and this one has not joined them."""
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) != size():
        raise RuntimeError(f"torchrun started {processes} processes, and this one has not joined them: wrap the call "
                           "in eekd.distributed.joined()")  # fmt: skip


def started() -> tuple[int, int]:
    """This process's number and how many torchrun started, for those that share work without a group.

    Each then has its own GPU, where there are enough. ValueError where torchrun's environment is incomplete.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    _check_environment()
    _take_gpu()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def wait_for_started() -> None:
    """Returns when every process that torchrun started has come here, were it days."""
    with joined(timedelta(days=30)):
        wait()


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def wait() -> None:
    """Returns when every process has come here."""
    if size() > 1:
        distributed.barrier()


def lost(error: RuntimeError) -> bool:
    """Whether it tells that another process ended or differs; gloo has no class of error for that."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def group_of(x: Tensor) -> distributed.ProcessGroup | None:
    """The group that exchanges `x`: the default one (None), or gloo for the CPU where a loop of its own joined NCCL."""
    if x.is_cuda or "cpu:" in distributed.get_backend_config():
        return None
    return _gloo(distributed.group.WORLD)


@functools.cache
def _gloo(world: distributed.ProcessGroup) -> distributed.ProcessGroup:
    return distributed.new_group(backend="gloo")


def largest(*numbers: int) -> list[int]:
    """The largest of each number over all processes."""
    return [*numbers] if size() == 1 else most(torch.tensor(numbers)).tolist()


def most(x: Tensor) -> Tensor:
    """The largest of `x` over all processes, entry by entry."""
    if size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x, distributed.ReduceOp.MAX, group_of(x))
    return x


def total(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in a new tensor."""
    if size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x, group=group_of(x))
    return x


def from_all(x: Tensor) -> Tensor:
    """(processes, *x.shape) on the CPU: the x of every process, in the order of their ranks."""
    x = x.detach().cpu().contiguous()
    if size() == 1:
        return x[None].clone()
    every = [torch.empty_like(x) for _ in range(size())]
    distributed.all_gather(every, x, group_of(x))
    return torch.stack(every)


def from_first(make: Callable[[], str]) -> str:
    """What `make()` gives in the first process, which alone calls it; RuntimeError in the others where it fails."""
    text = b""
    try:
        if first():
            text = make().encode() + b"\n"
    finally:
        [length] = largest(len(text))
    if not length:
        raise distributed.DistError("the first process could not go on")
    data = torch.frombuffer(bytearray(text or length), dtype=torch.uint8)
    if size() > 1:
        distributed.broadcast(data, 0, group_of(data))
    return data.numpy().tobytes().decode().removesuffix("\n")


def mean_(tensors: Iterable[Tensor]) -> None:
    """Replaces floating-point tensors by their means over all processes, in one exchange."""
    tensors = [x for x in tensors if x.is_floating_point()]
    if size() == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat, group=group_of(flat))
    flat /= size()
    parts = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])


def whole(x: Tensor) -> Tensor:
    """`x`, or where `x` is this process's part of a sharded tensor all of it, on the CPU; every process must ask."""
    return x.full_tensor().cpu() if sharded(x) else x


def whole_in_first(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors, `whole` one after another, in the first process; none in the others, which must ask too."""
    kept = {}
    for name, x in tensors:
        x = whole(x)
        if first():
            kept[name] = x
    return kept


def sharded(x: Tensor) -> bool:
    """Whether a process holds a part of `x` only."""
    return hasattr(x, "full_tensor")  # DTensor; importing its module takes half a second


def part(x: Tensor) -> Tensor:
    """What this process holds of `x`."""
    return x.to_local() if sharded(x) else x


def placed(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of `x`, which is whole in every process, where `like` is a part; else `x`."""
    if not sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def check_replicas(module: nn.Module) -> None:
    """RuntimeError, in every process, unless all have the same parameters and buffers, to the bit.

    What is sharded has no replica, and is left out.
    """
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        if not sharded(x):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    hashes = from_all(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    others = [r for r in range(size()) if not torch.equal(hashes[r], hashes[0])]
    if others:
        one, other = (hashes[r].numpy().tobytes().hex()[:12] for r in (0, others[0]))
        raise distributed.DistError(f"the network of process {others[0]} differs from that of process 0 (hash {other}, "
                                    f"not {one}): they must be replicas")  # fmt: skip
