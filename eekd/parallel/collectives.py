"""What processes hand each other: reductions, gathers, and the parts of sharded tensors.

With one process everything here gives back what it was given.
"""

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed, nn

from eekd.parallel.process_group import group_of, is_main_process, world_size


def max_across_processes(*numbers: int) -> list[int]:
    """The largest of each number over all processes."""
    return [*numbers] if world_size() == 1 else all_reduce_max(torch.tensor(numbers)).tolist()


def all_reduce_max(x: Tensor) -> Tensor:
    """The largest of `x` over all processes, entry by entry."""
    if world_size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x, distributed.ReduceOp.MAX, group_of(x))
    return x


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in a new tensor."""
    if world_size() == 1:
        return x
    x = x.clone()
    distributed.all_reduce(x, group=group_of(x))
    return x


def all_gather(x: Tensor) -> Tensor:
    """(processes, *x.shape) on the CPU: the x of every process, in the order of their ranks."""
    x = x.detach().cpu().contiguous()
    if world_size() == 1:
        return x[None].clone()
    every = [torch.empty_like(x) for _ in range(world_size())]
    distributed.all_gather(every, x, group_of(x))
    return torch.stack(every)


def broadcast(make: Callable[[], str]) -> str:
    """What `make()` gives in the first process, which alone calls it; RuntimeError in the others where it fails."""
    text = b""
    try:
        if is_main_process():
            text = make().encode() + b"\n"
    finally:
        [length] = max_across_processes(len(text))
    if not length:
        raise distributed.DistError("the first process could not go on")
    data = torch.frombuffer(bytearray(text or length), dtype=torch.uint8)
    if world_size() > 1:
        distributed.broadcast(data, 0, group_of(data))
    return data.numpy().tobytes().decode().removesuffix("\n")


def all_reduce_mean_(tensors: Iterable[Tensor]) -> None:
    """Replaces floating-point tensors by their means over all processes, in one exchange."""
    tensors = [x for x in tensors if x.is_floating_point()]
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat, group=group_of(flat))
    flat /= world_size()
    parts = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])


def full_tensor(x: Tensor) -> Tensor:
    """`x`, or where `x` is this process's part of a sharded tensor all of it, on the CPU; every process must ask."""
    return x.full_tensor().cpu() if is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def gather_to_main_process(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors, `whole` one after another, in the first process; none in the others, which must ask too."""
    kept = {}
    for name, x in tensors:
        x = full_tensor(x)
        if is_main_process():
            kept[name] = x
    return kept


def is_sharded(x: Tensor) -> bool:
    """Whether a process holds a part of `x` only."""
    return hasattr(x, "full_tensor")  # DTensor; importing its module takes half a second


def to_local(x: Tensor) -> Tensor:
    """What this process holds of `x`."""
    return x.to_local() if is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def distribute_like(x: Tensor, like) -> Tensor:
    """This process's part of `x`, which is whole in every process, where `like` is a part; else `x`."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def check_replicas(module: nn.Module) -> None:
    """RuntimeError, in every process, unless all have the same parameters and buffers, to the bit.

    What is sharded has no replica, and is left out.
    """
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        if not is_sharded(x):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    hashes = all_gather(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    others = [r for r in range(world_size()) if not torch.equal(hashes[r], hashes[0])]
    if others:
        one, other = (hashes[r].numpy().tobytes().hex()[:12] for r in (0, others[0]))
        raise distributed.DistError(
            f"the network of process {others[0]} differs from that of process 0 (hash {other}, "
            f"not {one}): they must be replicas"
        )
