"""The processes that torchrun started: who this one is, and how they begin and end.

Without torchrun there is one process.
"""

import atexit
import functools
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor, distributed

# What process_group() needs of torchrun's environment.
TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


@contextmanager
def process_group(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
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


def exit_process(code: int) -> NoReturn:
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
        raise ValueError(
            f"{', '.join(missing)} must be set where WORLD_SIZE is, got none: let torchrun start the processes"
        )


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
                store.set(f"{word}/seen", " ".join(store.get(other).decode() for other in others))
                return distributed.PrefixStore(word, store)
        elif store.check(["part"]):
            part = store.get("part").decode()  # perhaps that of a dead process
            store.set(f"{part}/{number}", word)
            if store.check([f"{part}/seen"]) and word in store.get(f"{part}/seen").decode():
                return distributed.PrefixStore(part, store)
        time.sleep(0.05)
    raise RuntimeError(f"process {number} of {count} waited {timeout} for the others, and not all came")


def check_process_group() -> None:
    """RuntimeError where torchrun started several processes and this one has not joined them."""
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) != world_size():
        raise RuntimeError(
            f"torchrun started {processes} processes, and this one has not joined them: wrap the call "
            "in eekd.parallel.process_group()"
        )


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many torchrun started, for those that share work without a group.

    Each then has its own GPU, where there are enough. ValueError where torchrun's environment is incomplete.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    _check_environment()
    _take_gpu()
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def long_barrier() -> None:
    """Returns when every process that torchrun started has come here, were it days."""
    with process_group(timedelta(days=30)):
        barrier()


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Returns when every process has come here."""
    if world_size() > 1:
        distributed.barrier()


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether it tells that another process ended or differs; gloo has no class of error for that."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def group_of(x: Tensor) -> distributed.ProcessGroup | None:
    """The group that exchanges `x`: the default one (None), or gloo for the CPU where a loop of its own joined NCCL."""
    if x.is_cuda or "cpu:" in distributed.get_backend_config():
        return None
    return _gloo(distributed.group.WORLD)  # pyright: ignore


@functools.cache
def _gloo(world: distributed.ProcessGroup) -> distributed.ProcessGroup:
    return distributed.new_group(backend="gloo")  # pyright: ignore[reportReturnType]
