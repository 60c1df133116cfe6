"""The Triton backend without a GPU: the op's own suite under Triton's interpreter, and the launch rule."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("triton")
import triton

import eekd.kernels.ensemble_kd
import eekd.kernels.sparse_ensemble_kd  # noqa: F401  both register the ops
from eekd.kernels import launch, tune
from eekd.kernels.launch import alignment, launch_for

OPS = Path(__file__).parent / "ops"
SUITES = [*sorted(OPS.glob("test_ensemble_kd*.py")), OPS / "test_sparse_ensemble_kd.py"]
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1"}
interprets = pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="Triton 3.6's interpreter takes arrays of one number for numbers, which NumPy 2.4 refuses",
)
# Some of every kind of behaviour, and of these only the cases that are not full by themselves.
DENSE = """
    formulas
    or (every_shape and (9x5x1001 or 5x3x5000 or 0x5x100 or 9x17x100) and (probability-label or logit-kl))
    or (every_shape and 65x5x10 and not 65x5x100 and (probability-label or logit-kl))
    or (every_dtype and labels and logit-kl and (bfloat16 or float64) and 100) or (many_rows and 2049)
    or (different_dtypes and probability) or (half_precision and logit-label)
    or (temperature_and_alpha and logit-kl) or (embedding_width and not 1500)
    or ten_thousand or far_apart or no_probability or padded_vocabulary or masked
    or (any_layout and (scores-6x3x13 or logit-label-query-6x3x1030)) or expanded or ignored or no_weight
    or (nan_that_is_read and quiet) or nan_in_the_attention or offsets
    or plain_distillation or (constant_added and logit-kl)
    or (gradcheck and mean and scores and (probability-label or logit-kl))
    or (upstream and float16 and logit-kl) or backward or (graph_that_is_kept and label-scores) or without_a_gradient
    or second_derivative or (not_asked and probability-label) or same_inputs
    or (compiles_whole and probability-label) or inductor or inference_mode
"""
SPARSE = """
    (columns_of_the_contract and (probability-label or logit-kl))
    or (every_shape and (65x5x10x1 or 65x5x100x31 or 9x17x101x33 or 0x5x100) and (probability-label or logit-kl))
    or (every_shape and 3x3x5000x1000 and probability-kl)
    or (every_dtype and labels and logit-kl and (bfloat16 or float64) and 100)
    or (no_probability_has and 60 and probability-label) or (only_some_snapshots and logit-label)
    or (any_order and 100 and probability-kl) or label_outside or (any_layout and logit-label-scores and 1030)
    or (ignored_rows and probability-label) or (no_weight and logit-kl) or (nan_inside and student)
    or (offsets and scores) or (not_computed and probability-label and scores) or (a_few_rows and 1100x10
        and logit-label-float32)
"""


def run_suites(expression: str, marked: str):
    chosen = f"triton and {' '.join(expression.split())}"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-m", marked, "-k", chosen, *SUITES]
    run = subprocess.run(command, env=INTERPRETED, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@interprets
@pytest.mark.full
@pytest.mark.parametrize("chosen", [f"not sparse and ({DENSE})", f"sparse and ({SPARSE})"], ids=["dense", "sparse"])
def test_the_ops_suites_in_the_interpreter(chosen):
    run_suites(chosen, "not slow")


@interprets
@pytest.mark.slow
def test_the_ops_whole_suites_in_the_interpreter():
    run_suites("test", "not slow")


BAD_INDICES = """
import mmap
import torch
from eekd.kernels import sparse_ensemble_kd as kernels
from eekd.kernels.launch import forward
from eekd.kernels.outputs import Call

torch.manual_seed(0)
rows, count, classes, kept = 4, 3, 40, 7
page = mmap.PAGESIZE
memory = torch.frombuffer(mmap.mmap(-1, 3 * page), dtype=torch.float32)
around = memory.numel() // 3
memory.fill_(7.0)
d_student = memory[around : around + rows * classes].view(rows, classes)
student, z = torch.randn(rows, classes), torch.randn(count, rows, kept)
tail, indices = torch.randn(count, rows), torch.stack([torch.randperm(classes)[:kept] for _ in range(rows)])
indices[1, 2], indices[2, 0], indices[2, 1] = classes, -1, 2**40 + 3
loss, attention_loss, weights = torch.empty(rows), torch.empty(rows), torch.empty(rows, count)
labels = torch.zeros(rows, dtype=torch.long)
call = Call(student, [z], labels, None, None, None, 5.0, 0.5, False, False, 0, -100, True, False, tail, indices)
outputs = [loss, attention_loss, weights, d_student, None, None, None]
forward(kernels.sparse_rows_kernel, kernels.plan, call, outputs)
assert loss.isnan().tolist() == [False, True, True, False], loss
assert d_student[[0, 3]].isfinite().all() and d_student[1:3].isnan().any()
assert (memory[:around] == 7).all() and (memory[around + rows * classes :] == 7).all()
"""


@interprets
def test_an_index_that_is_no_class_is_nan_and_nothing_outside_is_written():
    run = subprocess.run([sys.executable, "-c", BAD_INDICES], env=INTERPRETED, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_same_schemas_as_the_native_ops():
    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    names = {name for space, _, name in registered if space == "eekd_triton"}
    assert names >= {"ensemble_kd_fwd", "sparse_ensemble_kd_fwd", "ensemble_kd_bwd"}
    for name in names:
        native, triton = (str(getattr(x, name).default._schema) for x in (torch.ops.eekd, torch.ops.eekd_triton))
        assert native.removeprefix("eekd::") == triton.removeprefix("eekd_triton::")


@pytest.mark.parametrize("snapshots", [1, 2, 5, 17, 64])
def test_every_number_of_classes_has_a_launch(snapshots):
    for classes in (1, 2, 10, 100, 1000, 1001, 4096, 8192, 8193, 50257, 262144):
        for itemsize in (2, 4, 8):
            cut = launch_for(classes, snapshots, itemsize, "sm_90")
            assert cut.block >= (classes if cut.on_chip else 32) and cut.num_warps in (1, 2, 4, 8, 16)
            assert 1 <= cut.num_stages <= 3


def test_alignment():
    aligned = alignment(1000, 2, [0, 8], [1000, 1000], [8000])
    assert aligned == (8, False)
    assert alignment(1001, 2, [0, 8], [1001, 1001], [8008]) == (8, True)  # a batch of 8: all rows alike
    assert alignment(1001, 2, [0, 8], [1001, 1001], [9009]) == (1, False)  # of 9: snapshots begin elsewhere
    assert alignment(1001, 2, [0, 8], [1001, 5005], [1001]) == (1, False)  # (B, M, C) memory
    assert alignment(1000, 4, [1, 8], [1000, 1000], [8000]) == (1, False)


@interprets
def test_the_tuner_writes_the_table_that_launches_come_from(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "eekd.kernels.tune"]
    run = subprocess.run([*command, "--tiny", "--out", tmp_path], env=INTERPRETED, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "cpu.json").read_text())["launches"]
    assert len(written) == run.stdout.count("bytes") == 2
    # As if another launch had been the fastest, by far.
    bucket = launch.bucket(1000, 3, 2)
    other = launch.by_rule(1000, 3, 2)._replace(block=512, on_chip=False, num_stages=2, maxnreg=255)
    written[bucket]["launch"] = other._asdict()
    (tmp_path / "cpu.json").write_text(json.dumps({"launches": written}))
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    for cached in (launch.tuned, launch_for):
        cached.cache_clear()
    try:
        assert launch_for(1000, 3, 2, "cpu") == launch_for(513, 3, 2, "cpu") == other
        assert launch_for(1000, 3, 2, "cpu", again=True) == launch.by_rule(1000, 3, 2, again=True)
        assert launch_for(1000, 3, 2, "sm_90") == launch.by_rule(1000, 3, 2)
        assert launch_for(1025, 3, 2, "cpu") == launch.by_rule(1025, 3, 2)
    finally:
        for cached in (launch.tuned, launch_for):
            cached.cache_clear()


TUNED = """
import os
from pathlib import Path
from eekd.kernels import ensemble_kd, launch, tune

def entries():
    return sorted(path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).iterdir())

shape = tune.Shape(4096, 5, 1000, torch.bfloat16, "probability")
cut = launch.Launch(1, 1024, True, 4, 1, 128)
assert tune.compile_one(shape, cut) == tune.Compiled(64, 0)
found = entries()
tensors = tune.made(shape, "cpu")
plan = tune.planned(shape, cut, tensors)
ensemble_kd.rows_kernel[plan.grid](*tune.arguments(plan, tensors), **plan.options)
assert launched[-1][0] == "rows_kernel" and entries() == found
wrong = tune.compile_one(shape, cut._replace(block=2**21))
assert wrong.registers == 0 and wrong.failure, wrong
"""


def test_what_the_tuner_compiles_beforehand_is_what_it_launches(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", RECORDER + TUNED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("classes", [100, 1000, 4096, 32000, 128256])
@pytest.mark.parametrize("snapshots, itemsize", [(1, 2), (5, 2), (16, 4)])
def test_the_tuner_tries_the_rule_first_and_many_warps(classes, snapshots, itemsize):
    for again in (False, True):
        found = tune.candidates(classes, snapshots, itemsize, again)
        assert found[0] == launch.by_rule(classes, snapshots, itemsize, again) and len({*found}) == len(found) < 60
        assert {cut.num_warps for cut in found} >= {4, 8, 16}
        assert all(32 * cut.num_warps * (cut.maxnreg or 0) <= 65536 for cut in found)


def test_a_launch_that_fails_is_counted_and_passed_over():
    class Failing:
        def microseconds(self, cut, **how):
            raise ValueError("a wrong result\nat great length")

    failures = Counter()
    assert tune.timed(Failing(), launch.by_rule(10, 2, 4), failures, milliseconds=1) is None
    assert failures == {"ValueError: a wrong result": 1}


def test_the_tuner_without_a_gpu_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-m", "eekd.kernels.tune"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "no GPU was found" in run.stderr


# A driver that compiles for sm_90 and records launches instead of making them.
RECORDER = """
import types
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

launched = []


class Recorder:
    utils = types.SimpleNamespace(
        load_binary=lambda *args: (1, len(launched), 64, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )
    get_current_device = is_active = lambda self: 0
    get_current_stream = lambda self, device: 7
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    launcher_cls = lambda self, source, metadata: lambda *args: launched.append((source.name, *args))


driver.set_active(Recorder())
"""
LAUNCHES = (
    RECORDER
    + """
from eekd.kernels import ensemble_kd as kernels
from eekd.kernels.launch import forward
from eekd.kernels.outputs import Call


def step(student, snapshots, labels, upstream, *attention):
    rows, count = len(student), len(snapshots) if len(snapshots) > 1 else len(snapshots[0])
    outputs = [torch.empty_like(upstream), torch.empty_like(upstream), torch.empty(rows, count)]
    grads = [torch.empty_like(x) if x is not None else None for x in (student, *attention)]
    launched.clear()
    call = Call(student, snapshots, labels, *attention, 5.0, 0.5, False, False, 1, -100, True, True)
    forward(kernels.rows_kernel, kernels.plan, call, [*outputs, *grads])
    kernels.ensemble_kd_bwd(upstream, upstream, None, *grads)
    # Tensors are new in every step, and so is what the profiler would be told; all else must be the same.
    return [
        [type(x) if isinstance(x, torch.Tensor) or type(x).__name__ == "LazyDict" else
         tuple(map(type, x)) if isinstance(x, tuple) and isinstance(x[0], torch.Tensor) else x for x in call]
        for call in launched
    ]


def made(rows, classes, snapshots=3, whole=True, width=None, reduces=True, offset=0):
    memory = torch.empty(snapshots * rows * classes + offset)[offset:].view(snapshots, rows, classes)
    attention = torch.empty(rows, snapshots), None, None
    if width:
        attention = None, torch.empty(rows, width), torch.empty(snapshots, rows, width)
    return (
        torch.empty(rows, classes), [memory] if whole else list(memory), torch.empty(rows, dtype=torch.long),
        torch.ones(() if reduces else rows), *attention,
    )


expected = 0
for shape in (
    dict(rows=128, classes=100),
    dict(rows=64, classes=1001, whole=False),
    dict(rows=4096, classes=8),
    dict(rows=1, classes=1, snapshots=1, width=1),  # where Triton takes an argument of 1 for a constant
    dict(rows=1, classes=10, snapshots=1, reduces=False),
    dict(rows=9, classes=1, snapshots=1, width=1, reduces=False),
):
    first, second = (step(*made(**shape)) for _ in range(2))
    names = [call[0] for call in first]
    counts, reduces = shape["rows"] > 2048, shape.get("reduces", True)
    assert names == ["count_kernel"] * counts + ["rows_kernel"] + ["sum_kernel"] * reduces + ["scale_kernel"], names
    assert first == second and all(call[4] == 7 for call in first)
    expected += len(names)
    assert len(kernels.launch._compiled) == expected
step(*made(128, 100, offset=1))  # where 16-byte accesses are wrong, what was compiled for them is not used
assert launched[0][0] == "rows_kernel" and len(kernels.launch._compiled) == expected
vector = kernels.rows_kernel.arg_names.index("VECTOR") - len(kernels.rows_kernel.arg_names)
assert launched[0][vector] == 1, launched[0][vector]
"""
)


def test_what_is_launched_again_is_what_was_launched_first():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


SMALL_LAUNCHES = """
import torch
from eekd.kernels import launch, rows

for n in (1, 1023, 2049, 40000):
    labels = torch.arange(n) % 7 - 1
    counts = torch.empty(rows.COUNTS.value, dtype=torch.int32)
    launch.count_kernel[(rows.COUNTS.value, 1, 1)](labels, counts, n, -1, 1024, num_warps=4)
    assert counts.sum() == (labels != -1).sum()
    for dtype, block in ((torch.float32, 32768), (torch.float32, 1024), (torch.float64, 16384)):
        parts = torch.full((2, -(-n // 4) * 4), torch.nan, dtype=dtype)
        parts[:, :n] = torch.randint(-9, 9, (2, n))
        first, second = torch.empty(2, dtype=dtype)
        width = 16 // dtype.itemsize
        launch.sum_kernel[(2, 1, 1)](parts, first, second, n, parts.stride(0), block, width, block // 8, num_warps=4)
        assert [first, second] == [*parts[:, :n].sum(1)]
"""


@interprets
def test_labels_are_counted_and_parts_summed():
    run = subprocess.run([sys.executable, "-c", SMALL_LAUNCHES], env=INTERPRETED, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


UNTOUCHED = """
import mmap
import sys
import torch
import eekd.kernels.ensemble_kd

memory = mmap.mmap(-1, 4 * 30000, prot=0)  # neither to be read nor written
student = torch.frombuffer(memory, dtype=torch.float32).view(300, 100)
upstream = torch.full((300,) if sys.argv[1] == "rows" else (), float(sys.argv[2]))
torch.ops.eekd_triton.ensemble_kd_bwd(upstream, None, None, student, None, None, None)
"""


@interprets
@pytest.mark.parametrize("of", ["all", "rows"])
def test_the_backward_of_1_neither_reads_nor_writes_a_gradient(of):
    for upstream, status in (("1", 0), ("2", -signal.SIGSEGV)):
        run = subprocess.run([sys.executable, "-c", UNTOUCHED, of, upstream], env=INTERPRETED, capture_output=True)
        assert run.returncode == status, run.stderr
