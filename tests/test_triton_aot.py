"""The Triton kernels compiled for absent GPUs: hardly a spill, wide loads, shared memory within the limit."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("eekd.kernels.ensemble_kd")
sparse_kernels = pytest.importorskip("eekd.kernels.sparse_ensemble_kd")
ASTSource = pytest.importorskip("triton.compiler").ASTSource
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

launch = pytest.importorskip("eekd.kernels.launch")
Call = pytest.importorskip("eekd.kernels.outputs").Call
rows = pytest.importorskip("eekd.kernels.rows")
SEPARATE = rows.SEPARATE.value
pytestmark = pytest.mark.full

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}  # KB per block
SPILLED = 16  # bytes: each compiler keeps a few registers of one kernel or another on the stack
# By reading and (M, C) or (M, C, K): what Triton 3.9 keeps there of 16 bits, on the worst architecture. Every case of
# this file was compiled; no other is above SPILLED.
ON_STACK = {
    ("probability", "label", 4, 4096): 64,  # 32 columns a thread, as (5, 4096)
    ("probability", "label", 5, 1000): 56,  # 32 columns; with 16 nothing, but 115 instructions each, more than BUDGET
    ("probability", "label", 5, 4096): 144,  # 32 columns a thread; with 16 nothing, but 111 instructions a column
    ("probability", "label", 5, 32000): 32,  # 13 of 3592 instructions, on sm_100 alone
    ("probability", "label", 8, 2048): 24,  # 10 of 2424 instructions
    ("probability", "kl", 5, 1001): 24,  # 10 instructions, of fp16, on sm_90 alone
    ("logit", "label", 2, 50257, 64): 24,  # 12 instructions, on sm_100 alone: FOR_THREE leaves 168 registers
    ("logit", "kl", 2, 50257, 64): 24,
    ("logit", "label", 64, 50257, 64): 24,  # 10 instructions, on sm_90 alone
}
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
# Both sides of every step of the launch rule, and the sizes people train: (M, C).
SHAPES = [
    (5, 10), (5, 100), (1, 512), (1, 1000), (5, 1000), (5, 1001), (16, 1000), (64, 256), (8, 2048), (4, 4001),
    (4, 4096), (2, 4096), (1, 8192), (5, 4096), (64, 1000), (17, 5000), (5, 32000), (2, 50257), (8, 128256),
]  # fmt: skip
READINGS = [("probability", "label"), ("probability", "kl"), ("logit", "label"), ("logit", "kl")]
# On every commit; `pytest -m slow` compiles all shapes, readings and dtypes for all architectures.
QUICK = [
    *((capability, 5, 1000, torch.bfloat16, "probability", "kl") for capability in SHARED_LIMIT),
    *((capability, 5, 1001, torch.float16, "logit", "kl") for capability in SHARED_LIMIT),
    (80, 2, 4096, torch.float32, "logit", "kl"),
    (80, 2, 50257, torch.float32, "probability", "kl"),
    (90, 4, 4001, torch.bfloat16, "probability", "kl"),
    (90, 5, 32000, torch.bfloat16, "logit", "kl"),
    (100, 5, 10, torch.float32, "logit", "kl"),
    (120, 5, 32000, torch.float32, "probability", "label"),
    (120, 1, 8192, torch.bfloat16, "logit", "label"),
]
# Of sparse_ensemble_kd, (M, C, K): one and several blocks of indices, rows on chip and streamed.
SPARSE = [
    (5, 10, 4), (5, 100, 10), (2, 2500, 15), (5, 1000, 32), (5, 1000, 64), (1, 1001, 100), (5, 1001, 64),
    (16, 1000, 50), (64, 1000, 20), (2, 4096, 128), (5, 8192, 64), (5, 8193, 64), (5, 32000, 64), (2, 50257, 64),
    (64, 50257, 64), (8, 128256, 50),
]  # fmt: skip
SPARSE_QUICK = [
    (80, 5, 1000, 32, torch.bfloat16, "probability", "kl"),
    (90, 5, 1000, 64, torch.bfloat16, "probability", "label"),
    (90, 5, 32000, 64, torch.bfloat16, "logit", "kl"),
    (90, 2, 2500, 15, torch.float32, "logit", "kl"),
    (100, 5, 100, 10, torch.float32, "logit", "kl"),
    (120, 2, 50257, 64, torch.float32, "probability", "kl"),
]


def arguments(count, classes, dtype, fusion, objective, attention="scores", whole=True, kept=None, soft=False):
    """What the kernel is launched with, all outputs asked for; a batch of 8192, at 16 bytes; sparse if K is given."""
    rows, width = 8192, 8

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    module, kernel, more = kernels, kernels.rows_kernel, ()
    if kept is not None:
        module, kernel = sparse_kernels, sparse_kernels.sparse_rows_kernel
        more = empty(count, rows), empty(rows, kept, dtype=torch.int64)
    logits = empty(count, rows, kept or classes, dtype=dtype)
    inputs = {
        "scores": (empty(rows, count), None, None),
        "query": (None, empty(rows, width), empty(count, rows, width)),
    }[attention]
    snapshots = (logits,) if whole else tuple(logits)
    labels, student = empty(rows, dtype=torch.int64), empty(rows, classes, dtype=dtype)
    if soft:
        labels = empty(rows, classes, dtype=dtype)
    options = 5.0, 0.5, fusion == "logit", objective == "kl", launch.MEAN, -100, True, True
    call = Call(student, snapshots, labels, *inputs, *options, *more)
    outputs = [empty(dtype=dtype if dtype == torch.float64 else torch.float32), None, None, student, *inputs]
    planned = module.plan(call, outputs)
    tensors = (
        student, logits if whole else snapshots, *more, labels, *inputs, empty(dtype=torch.int32), empty(rows),
        empty(rows), empty(rows, count), student, *inputs,
    )  # fmt: skip
    named = zip(kernel.arg_names, (*tensors, *planned.numbers), strict=True)
    return dict(named) | {"of": kernel, "options": planned.options}


def compiled(capability, arguments):
    """The kernel for these arguments, specialised as a launch would."""
    arguments = dict(arguments)
    of = arguments.pop("of")
    signature, constants, attributes = {}, {}, {}

    def type_of(path, value):
        if isinstance(value, tuple):
            return tuple(type_of((*path, i), v) for i, v in enumerate(value))
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "fp64" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"

    options = arguments.pop("options")
    for i, parameter in enumerate(of.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = type_of((i,), value)
    source = ASTSource(of, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def facts(kernel, folder):
    """Stack bytes, and how many SASS instructions of each name."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def dump(what):
        return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout

    stack = int(re.search(r"STACK:(\d+)", dump("-res-usage")).group(1))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", dump("-sass"), re.M)
    assert len(names) > 100
    return stack, names


def check(folder, capability, snapshots, classes, dtype, fusion, objective, **kind):
    launched = arguments(snapshots, classes, dtype, fusion, objective, **kind)
    kernel = compiled(capability, launched)
    stack, names = facts(kernel, folder)
    wide = sum(name.startswith("LDG") and ".128" in name for name in names)
    case = fusion, objective, snapshots, classes, *kind.values()
    most = ON_STACK.get(case, SPILLED) if dtype.itemsize == 2 else SPILLED
    assert stack <= most
    assert sum(name.startswith(("LDL", "STL")) for name in names) <= most / 2
    assert kernel.metadata.shared <= SHARED_LIMIT[capability] * 1024
    # Every element of the tile in 16 bytes at a time, as often as the kernel visits it.
    threads, visits = 32 * launched["options"]["num_warps"], 1 if launched["ON_CHIP"] else 2
    lines = launched["MP"] if snapshots > SEPARATE else snapshots
    elements = launched["R"] * launched["BLOCK"] * (lines + 1 if "kept" not in kind else 1)
    if not launched["ON_CHIP"]:  # and read ahead
        assert sum(name.startswith("LDGSTS") for name in names) >= visits
    wide_loads = launched["VECTOR"] * dtype.itemsize == 16
    tile = elements if snapshots > SEPARATE or "kept" in kind else launched["R"] * launched["BLOCK"]
    if wide_loads and tile * dtype.itemsize >= 16 * threads:  # else a thread has less
        assert wide >= visits * elements * dtype.itemsize / 16 / threads / 2  # half, for rounding M up reads nothing
    if "kept" in kind and not launched["SHIFTED"]:  # the columns of the bucket are written past the K columns
        stores = sum(name.startswith("STG") and ".128" in name for name in names)
        assert stores >= elements * dtype.itemsize / 16 / threads


def instructions_per_column(kernel, folder, arguments):
    """Instructions that the threads of a program issue for its rows, over the columns of these.

    All are counted, whether predicated off or not. What is in a loop backwards counts as often as the loop takes whole
    blocks; everything else once, the code for the last columns and for labels included, whichever way a branch goes.
    """
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    dumped = subprocess.run([CUOBJDUMP, "-sass", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    code = [
        (int(at, 16), name, rest)
        for at, name, rest in re.findall(
            r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", dumped.stdout, re.M
        )
    ]
    last = max(i for i, (_, name, _) in enumerate(code) if name == "EXIT")
    issued = last + 1
    blocks = arguments["C"] // arguments["BLOCK"]
    loops = 0
    for at, name, rest in code[: last + 1]:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            issued += (blocks - 1) * sum(int(target[1], 16) <= address <= at for address, _, _ in code)
            loops += 1
    assert loops == (0 if arguments["ON_CHIP"] else 2)  # the two visits, and no other
    return issued * 32 * arguments["options"]["num_warps"] / arguments["R"] / arguments["C"]


# The last two have no last columns, whose code is counted though it is skipped.
BUDGET = [
    (5, 1000, 100),
    (5, 4096, 100),
    (5, 32000, 100),
    (4, 1000, 100),
    (4, 4096, 100),
    (4, 32000, 100),
    (5, 8192, 128),
    (5, 16384, 108),
]


@pytest.mark.parametrize("fusion", ["probability", "logit"])
@pytest.mark.parametrize(
    "snapshots, classes, limit", [*BUDGET[:3], *(pytest.param(*x, marks=pytest.mark.slow) for x in BUDGET[3:])]
)
def test_few_instructions_a_column(tmp_path, snapshots, classes, limit, fusion):
    launched = arguments(snapshots, classes, torch.bfloat16, fusion, "label")
    assert instructions_per_column(compiled(90, launched), tmp_path, launched) <= limit


@pytest.mark.parametrize("capability, snapshots, classes, dtype, fusion, objective", QUICK, ids=str)
def test_compiles_well(tmp_path, capability, snapshots, classes, dtype, fusion, objective):
    check(tmp_path, capability, snapshots, classes, dtype, fusion, objective)


@pytest.mark.parametrize("capability, snapshots, classes, kept, dtype, fusion, objective", SPARSE_QUICK, ids=str)
def test_sparse_compiles_well(tmp_path, capability, snapshots, classes, kept, dtype, fusion, objective):
    check(tmp_path, capability, snapshots, classes, dtype, fusion, objective, kept=kept)


@pytest.mark.parametrize("kind", [{"attention": "query"}, {"whole": False}, {"soft": True}], ids=str)
def test_other_arguments_compile_well(tmp_path, kind):
    check(tmp_path, 90, 5, 1000, torch.bfloat16, "probability", "label", **kind)


@pytest.mark.parametrize("classes", [1001, 32000])
@pytest.mark.parametrize("snapshots", [5, 9])
@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_soft_labels_compile(tmp_path, classes, snapshots, fusion):
    launched = arguments(snapshots, classes, torch.bfloat16, fusion, "label", soft=True)
    kernel = compiled(90, launched)
    stack, _ = facts(kernel, tmp_path)
    assert stack <= SPILLED and kernel.metadata.shared <= SHARED_LIMIT[90] * 1024


@pytest.mark.parametrize("snapshots, classes, kept", [(5, 1001, 64), (5, 32000, 64), (2, 2500, 15)])
@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_sparse_soft_labels_compile(tmp_path, snapshots, classes, kept, fusion):
    launched = arguments(snapshots, classes, torch.bfloat16, fusion, "label", kept=kept, soft=True)
    kernel = compiled(90, launched)
    stack, _ = facts(kernel, tmp_path)
    assert stack <= SPILLED and kernel.metadata.shared <= SHARED_LIMIT[90] * 1024


@pytest.mark.parametrize("capability", list(SHARED_LIMIT))
def test_the_backward_compiles_well(tmp_path, capability):
    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    numbers = {"B": 8192, "M": 5, "C": 1000, "D": 64, "MP": 8, "CP": 1024, "DP": 64, "TILE": kernels.SCALED}
    tensors = {
        "d_loss": empty(), "d_attention_loss": empty(), "count": empty(dtype=torch.int64),
        "d_student": empty(8192, 1000, dtype=torch.bfloat16), "d_scores": None,
        "d_query": empty(8192, 64), "d_keys": empty(5, 8192, 64),
    }  # fmt: skip
    for per_row in (False, True):
        each = {"PER_ROW": per_row, "ATTENTION_PER_ROW": per_row, "loss_stride": per_row, "attention_stride": per_row}
        launched = tensors | numbers | each | {"of": kernels.scale_kernel, "options": {"num_warps": 4}}
        stack, names = facts(compiled(capability, launched), tmp_path)
        assert stack == 0 and not [name for name in names if name.startswith(("LDL", "STL"))]
        assert sum(name.startswith("LDG") and ".128" in name for name in names) >= 3


def test_the_small_launches_have_all_loads_under_way(tmp_path):
    def code(of, warps, **launched):
        kernel = compiled(90, launched | {"of": of, "options": {"num_warps": warps}})
        stack, names = facts(kernel, tmp_path)
        assert stack == 0
        loads = [i for i, name in enumerate(names) if name.startswith("LDG") and ".128" in name]
        return len(loads), sum(name.startswith("BAR") for name in names[: loads[-1]])

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    tensors = {"labels": empty(32768, dtype=torch.int64), "o_counts": empty(32, dtype=torch.int32)}
    assert code(launch.count_kernel, 4, **tensors, B=32768, ignore_index=-100, BLOCK=1024) == (4, 0)
    for n in (32768, 32767):
        numbers = {"n": n, "stride": 32768, "BLOCK": 32768, "VECTOR": 4, "THREADS": 1024}
        assert code(launch.sum_kernel, 32, parts=empty(2, 32768), o_first=empty(), o_second=empty(), **numbers) == (
            8,
            0,
        )


@pytest.mark.slow
@pytest.mark.parametrize("capability", list(SHARED_LIMIT))
@pytest.mark.parametrize("snapshots, classes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fusion, objective", READINGS)
def test_the_launch_table_compiles_well(tmp_path, capability, snapshots, classes, dtype, fusion, objective):
    check(tmp_path, capability, snapshots, classes, dtype, fusion, objective)


@pytest.mark.slow
@pytest.mark.parametrize("capability", list(SHARED_LIMIT))
@pytest.mark.parametrize("snapshots, classes, kept", SPARSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion, objective", READINGS)
def test_the_sparse_rule_compiles_well(tmp_path, capability, snapshots, classes, kept, dtype, fusion, objective):
    check(tmp_path, capability, snapshots, classes, dtype, fusion, objective, kept=kept)
