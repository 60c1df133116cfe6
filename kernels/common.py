"""What the kernels share: the launch table and the rule behind it, and helpers of a row of a tile."""

import functools
import json
from math import gcd
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

# A tile of R rows is held in registers as fp32: M snapshots, rounded up to a power of two, and three lines of the
# student, all by a block of columns. These limits keep every variant free of spills on sm_80 to sm_120, which
# tests/test_triton_aot.py asserts.
PER_THREAD = 112  # numbers of a tile, of 255 registers
ON_CHIP = 32768  # numbers of a tile that is read once and kept
STREAMED = 11264  # numbers of a tile that is read, used and dropped, by STREAMING_WARPS
STREAMING_WARPS = 4
PACKED = 512  # numbers below which a program takes several rows
READ_AHEAD = 88 * 1024  # bytes of shared memory for tiles on their way; sm_120 has 99 KB
TABLES = Path(__file__).with_name("launch")


class Launch(NamedTuple):
    """How the rows of one shape are cut: `rows` per program, tiles of `block` columns, read once if `on_chip`.

    Tiles that are not are read ahead of their use by `num_stages` - 1. Up to `maxnreg` registers are used per thread,
    whatever that costs in occupancy; None leaves it to the compiler, which would rather spill a few.
    """

    rows: int
    block: int
    on_chip: bool
    num_warps: int
    num_stages: int
    maxnreg: int | None

    @property
    def options(self) -> dict[str, int]:
        limits = {"maxnreg": self.maxnreg} if self.maxnreg and torch.version.hip is None else {}
        return {"num_warps": self.num_warps} | limits


def bucket(classes: int, snapshots: int, itemsize: int) -> str:
    """The entry of the launch table that holds this shape."""
    return f"{next_power_of_2(classes)} classes, {next_power_of_2(snapshots)} snapshots, {itemsize} bytes"


@functools.lru_cache
def tuned(architecture: str) -> dict[str, Launch]:
    """The frozen table of a GPU architecture, which eekd.kernels.tune measured; empty where nobody did."""
    path = TABLES / f"{architecture}.json"
    launches = json.loads(path.read_text())["launches"] if path.is_file() else {}
    return {name: Launch(**entry["launch"]) for name, entry in launches.items()}


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """What launches depend on: sm_90, gfx942; the device's type where it is not a GPU."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").split(":")[0] or f"sm_{properties.major}{properties.minor}"


@functools.lru_cache
def launch(classes: int, snapshots: int, itemsize: int, architecture: str) -> Launch:
    """The launch of a shape, the same every time so that the bits are: the tuned one, or else the rule's."""
    return tuned(architecture).get(bucket(classes, snapshots, itemsize)) or by_rule(classes, snapshots, itemsize)


def by_rule(classes: int, snapshots: int, itemsize: int) -> Launch:
    padded, block = next_power_of_2(snapshots), next_power_of_2(classes)
    lines = (padded + 3) * (2 if itemsize == 8 else 1)
    if lines * block <= ON_CHIP:
        rows = next_power_of_2(max(1, PACKED // (lines * block)))
        warps = next_power_of_2(-(-rows * lines * block // (32 * PER_THREAD)))
        return Launch(rows, block, True, warps, 1, None)
    while lines * block > STREAMED:
        block //= 2
    ahead = READ_AHEAD // ((padded + 1) * block * itemsize)
    return Launch(1, block, False, STREAMING_WARPS, min(3, 1 + ahead), 255)


class Alignment(NamedTuple):
    """Rows begin at multiples of `vector` elements, or, if `shifted`, all equally far beyond one."""

    vector: int
    shifted: bool


def alignment(columns: int, itemsize: int, pointers: list[int], row_strides: list[int], other_strides: list[int]):
    """How 16-byte accesses meet the rows of tensors; pointers and strides are counted in elements.

    Rows of an odd length begin anywhere, and a tile of them would be read element by element. Where all tensors are
    equally far off in each row, the tile begins at the multiple of 16 bytes before the row, and its first columns and
    last are dropped. A 16-byte piece that holds an element of the tensor lies in its page, so nothing can fault.
    """
    vector = 16 // itemsize
    common = gcd(vector, columns, *pointers, *row_strides, *other_strides)
    alike = len({stride % vector for stride in row_strides}) == 1
    if common < vector and alike and all(x % vector == 0 for x in (*pointers, *other_strides)):
        return Alignment(vector, True)
    return Alignment(common, False)


KEPT = 1024  # compiled kernels by key
_compiled = {}


def start(kernel, grid: tuple[int, int, int], arguments: tuple, options: dict, key: tuple, aligned: bool) -> None:
    """kernel[grid](*arguments, **options), past Triton's examination of every argument where the key was met before.

    The key determines all that Triton compiles for, but for the pointers: these are multiples of 16 bytes if `aligned`.
    """
    compiled = _compiled.get(key) if aligned else None
    if compiled is not None:
        compiled[grid](*arguments)
        return
    compiled = kernel[grid](*arguments, **options)  # None in the interpreter
    if aligned and compiled is not None:
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = compiled


@triton.jit
def finite(x):
    """x, or 0 for -inf: the maximum to subtract from a row of nothing but -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def powers(x, largest, k, AXIS: tl.constexpr):
    """2^(k (x - largest)) with `largest` per row of x. The same words twice are computed once while x stays on chip."""
    return tl.exp2((x - tl.expand_dims(finite(largest), AXIS)) * k)


@triton.jit
def absorb(largest, total, x, k, AXIS: tl.constexpr):
    """Takes columns x into softmax statistics: their maximum, and Σ 2^(k (x - maximum))."""
    new = tl.maximum(largest, tl.max(x, AXIS))
    return new, total * tl.exp2((largest - finite(new)) * k) + tl.sum(powers(x, new, k, AXIS), AXIS)


@triton.jit
def softmax_grad(w, g):
    """(R, M): a gradient through softmax weights becomes one through the scores."""
    return w * (g - tl.sum(w * g, 1)[:, None])


@triton.jit
def counted(labels, B, ignore_index, BLOCK: tl.constexpr):
    """How many of the B labels are not `ignore_index`, but 1 at least."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, B, BLOCK):
        at = first + tl.arange(0, BLOCK)
        count += (tl.load(labels + at, mask=at < B, other=ignore_index) != ignore_index).to(tl.int32)
    return tl.maximum(tl.sum(count, 0), 1)


@triton.jit
def count_kernel(labels, o_count, B, ignore_index, BLOCK: tl.constexpr):
    tl.store(o_count, counted(labels, B, ignore_index, BLOCK))


@triton.jit
def sum_kernel(parts, o_first, o_second, n, stride, BLOCK: tl.constexpr):
    """The sums of the two rows of parts (2, n), each in one fixed order."""
    first = tl.zeros([BLOCK], parts.dtype.element_ty)
    second = tl.zeros([BLOCK], parts.dtype.element_ty)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        first += tl.load(parts + at, mask=at < n, other=0.0)
        second += tl.load(parts + stride + at, mask=at < n, other=0.0)
    tl.store(o_first, tl.sum(first, 0))
    tl.store(o_second, tl.sum(second, 0))
