"""The bench checks before it times and saves all it prints; info tells what a number depends on."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tables import kernels

import eekd
from eekd import _C, info
from eekd.kernels import bench, contenders, timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `bench --quick` prints, and the record that it saves."""
    path = tmp_path_factory.mktemp("bench") / "made" / "quick.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bench.main(["--quick", "--threads", "1", "--seed", "3", "--json", str(path)])
    return printed.getvalue(), json.loads(path.read_text())


def test_the_record_is_complete(quick):
    _, record = quick
    assert record["op"] == "ensemble_kd" and record["seed"] == 3 and record["threads"] == 1
    assert record["command"][:3] == ["python", "-m", "eekd.kernels.bench"] and "--quick" in record["command"]
    assert record["environment"].keys() == info.environment().keys()
    assert record["environment"]["threads"] == 1 and record["device"] == "cpu" and record["missing"] == {}
    assert [(row["shape"], row["fusion"]) for row in record["rows"]] == [
        (shape, fusion) for shape in ([32, 5, 10], [16, 3, 1000]) for fusion in ("probability", "logit")
    ]
    for row in record["rows"]:
        r = row["contenders"]
        assert r.keys() == {"native", "eager:einsum", "compile:default", "copy"}
        assert (row["dtype"], row["layout"], row["fastest"]) == ("float32", "MBC", "native")
        for name, figures in r.items():
            assert 0 < figures["p20"] <= figures["us"] <= figures["p80"] and figures["us_random"] > 0
            assert "peak_bytes" in figures and (name == "copy" or 0 <= figures["error"] < 1e-4)
        assert r["native"]["vs_eager"] == r["eager:einsum"]["us"] / r["native"]["us"]
        assert r["native"]["vs_compile"] == r["compile:default"]["us"] / r["native"]["us"]
        b, m, c = row["shape"]
        assert r["native"]["accesses"] == r["copy"]["accesses"] == m + 2
        assert math.isclose(r["native"]["gb_s"], (m + 2) * b * c * 4 / r["native"]["us"] / 1e3)
        assert math.isclose(r["native"]["percent_of_copy"], 100 * r["native"]["gb_s"] / r["copy"]["gb_s"])


def test_the_summary_is_of_the_rows(quick):
    _, record = quick
    ratios = [row["contenders"]["native"]["vs_compile"] for row in record["rows"]]
    summary = record["summary"]["native"]
    assert summary["least_vs_compile"] == min(ratios) and summary["fastest"] == len(ratios)
    assert math.isclose(summary["geomean_vs_compile"], math.prod(ratios) ** (1 / len(ratios)))
    assert record["summary"].keys() == {"native"} and "geomean_vs_liger" not in summary


def test_each_row_is_printed(quick):
    printed, record = quick
    for row in record["rows"]:
        r = row["contenders"]
        figures = f"{r['native']['us']:.0f} +{r['eager:einsum']['us']:.0f} .* {r['native']['vs_eager']:.1f} .* native"
        assert re.search(rf"{re.escape(str(tuple(row['shape'])))} .*{row['fusion']} +{figures}", printed)
    assert f"least_vs_compile {record['summary']['native']['least_vs_compile']:.3g}" in printed


def measure(functions, case=((16, 3, 100), "float32", "probability"), clock=timing.wall):
    return bench.measure(contenders.Case(*case), CPU, functions, clock, 0.001, 0)


@pytest.mark.parametrize("what", ["loss", "student", "scores", "a hundredth of a row", "upstream", "nan"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wrong_kernel_is_not_timed(what, dtype):
    class Unscaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, 16.0 if dtype == "float16" else 1.0)  # right for the upstream gradient of 1

    def wrong(student, snapshots, labels, scores, fusion):
        if what == "student":
            student = student.detach() + 0 * student
        elif what == "scores":
            scores = scores.detach() + 0 * scores
        elif what == "a hundredth of a row":
            student = torch.cat([student[:, :1].detach() + 0 * student[:, :1], student[:, 1:]], 1)
        loss = contenders.fused(student, snapshots, labels, scores, fusion)
        if what == "upstream":
            return Unscaled.apply(loss)
        return loss * {"loss": 1.02, "nan": math.nan}.get(what, 1.0)

    row = measure({"native": wrong, "eager:einsum": contenders.plain}, ((16, 3, 100), dtype, "probability"))
    assert row["contenders"]["native"].keys() == {"error", "failed"} and row["fastest"] is None
    assert row["contenders"]["eager:einsum"]["us"] > 0
    line = bench.line_of(row).splitlines()
    assert re.fullmatch(rf"native is wrong by .*, not timed at \(16, 3, 100\) {dtype} MBC probability", line[1])
    assert bench.summary_of([row]) == {}


def test_gradients_that_underflow_in_fp16_do_not_make_a_kernel_wrong():
    row = measure({"native": contenders.fused}, ((100000, 1, 10), "float16", "probability"))
    assert row["contenders"]["native"]["us"] > 0


def test_a_wrong_kernel_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(contenders, "fused", lambda *args: 1.01 * contenders.plain(*args))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(SystemExit, match="eekd failed 2 times"):
        bench.main(["--quick", "--shape", "8,2,10", "--threads", "1"])
    assert "native is wrong by" in capsys.readouterr().out


def test_a_contender_that_raises_leaves_the_others_to_be_timed():
    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nmuch more")

    row = measure(
        {"native": contenders.fused, "eager:einsum": greedy, "eager:sum": contenders.plain, "compile:default": greedy}
    )
    r = row["contenders"]
    assert r["eager:einsum"] == {"failed": "raises OutOfMemoryError: CUDA out of memory much more"}
    assert row["best_us"] == {"eager": r["eager:sum"]["us"], "compile": None, "liger": None}
    assert r["native"].keys() >= {"us", "vs_eager"} and "vs_compile" not in r["native"]


def test_a_case_that_does_not_fit_is_told_and_the_next_is_timed(monkeypatch, capsys, tmp_path):
    def inputs(case, *rest):
        if case.shape[0] == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(case, *rest)

    made = contenders.inputs
    monkeypatch.setattr(bench, "inputs", inputs)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    bench.main(["--quick", "--shape", "9,2,10", "--shape", "8,2,10", "--json", str(tmp_path / "b.json")])
    record = json.loads((tmp_path / "b.json").read_text())
    assert len(record["rows"]) == 2 and len(record["missing"]) == 2
    assert capsys.readouterr().out.count("does not fit: CUDA out of memory") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fusion", ["probability", "logit"])
@pytest.mark.parametrize("layout", ["MBC", "BMC"])
@pytest.mark.parametrize("shape", [(9, 5, 10), (4, 1, 1001), (300, 2, 70), (9, 5, 100, 20), (4, 1, 30, 29)])
def test_all_contenders_compute_the_same(shape, layout, fusion, dtype):
    case = contenders.Case(shape, dtype, fusion, layout)
    (tensors,) = contenders.inputs(case, CPU, 1)
    snapshots = tensors[1]
    if len(shape) == 4:
        assert snapshots.logits.shape == (shape[1], shape[0], shape[3]) and snapshots.indices.max() < shape[2]
    else:
        assert snapshots.shape == (shape[1], shape[0], shape[2])
    if len(shape) == 3 and shape[1] > 1:
        assert tensors[1].is_contiguous() == (layout == "MBC")
    truth, upstream = contenders.exact(tensors, fusion), torch.tensor(0.7 * shape[0])
    for run in (contenders.fused, contenders.plain, lambda *x: contenders.plain(*x, mix=contenders.broadcast)):
        got = contenders.gradients(run, tensors, fusion, upstream)
        assert contenders.error(got, truth, upstream) < contenders.ERROR_LIMIT[dtype]
        assert [x.dtype for x in got] == [torch.float32, getattr(torch, dtype), torch.float32]


def test_the_other_op_is_timed_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    path = tmp_path / "sparse.json"
    bench.main(["--op", "sparse_ensemble_kd", "--quick", "--shape", "8,5,40,10", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["op"] == "sparse_ensemble_kd" and [row["shape"] for row in record["rows"]] == [[8, 5, 40, 10]] * 2
    for row in record["rows"]:
        r = row["contenders"]
        assert r["native"]["error"] < 1e-4 and r["native"]["accesses"] == 2 + 5 * 10 / 40
        assert math.isclose(r["native"]["percent_of_copy"], 100 * r["copy"]["us"] / r["native"]["us"])
    assert "(B, M, C, K)" in capsys.readouterr().out
    table = kernels.bench(record | {"environment": record["environment"] | {"commit": "c" * 40}})
    assert "(B, M, C, K)" in table and "(8, 5, 40, 10)" in table


def test_the_reference_in_parts_is_the_reference():
    (tensors,) = contenders.inputs(
        contenders.Case((40, 2, 2**20 // 4), "float32", "logit"), CPU, 0
    )  # a part is 32 rows
    truth = contenders.exact([x[..., :32, :] if x.dim() == 3 else x[:32] for x in tensors], "logit")
    for a, b in zip(contenders.exact(tensors, "logit")[1:], truth[1:], strict=True):
        assert len(a) == 40 and torch.equal(a[:32], b)


def test_inputs_rotate_and_contenders_take_turns(monkeypatch):
    """What a GPU gets: every set in turn, warm-up, both upstream gradients, and below 50 µs a graph and the host."""
    for module in (bench, contenders):
        monkeypatch.setattr(module, "rotation", lambda size, device: 3)
    seen, captured = [], []

    def spied(name, function):
        def run(student, *rest):
            seen.append((name, student.data_ptr()))
            return function(student, *rest)

        return run

    def events(calls):
        return [1e-6 * (i + 1) for i, call in enumerate(calls) if call() is not None]

    def in_graph(calls):
        captured.append([call() for call in calls])
        if len(captured) == 3:
            raise RuntimeError("cannot be captured")
        return 7e-6

    monkeypatch.setattr(bench, "events", events)
    monkeypatch.setattr(bench, "in_graph", in_graph)
    functions = {"native": contenders.fused, "eager:sum": contenders.plain, "liger": contenders.plain}
    r = measure({name: spied(name, function) for name, function in functions.items()}, clock=events)["contenders"]
    assert {round(figures["us"], 3) for figures in r.values()} == {5} and r["native"]["p80"] == pytest.approx(8)
    assert r["native"]["graph_us"] == pytest.approx(7) and r["native"]["host_us"] > 0
    assert r["copy"]["graph_failed"] == "cannot be captured" and "graph_us" not in r["copy"]
    assert "graph_us" not in r["liger"] and "graph_failed" not in r["liger"] and r["liger"]["host_us"] > 0
    assert len(captured) == 3 and all(len(calls) == 3 for calls in captured)  # native, eager, copy: each set once
    sets = {name: [at for who, at in seen if who == name][2:] for name in r.keys() - {"copy"}}  # after both checks
    for order in sets.values():
        assert len({*order}) == 3 and all(order[i] == order[i + 3] for i in range(len(order) - 3))
    turns = [name for i, (name, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != name]
    assert turns == [*functions, *functions] + 10 * [*functions] + [*functions]  # checks, warm-up, turns, graphs


def test_a_gpu_sleeps_while_events_are_recorded(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, other):
            return other.at - self.at  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert timing.events([lambda: log.append("call")] * 2) == [2e-3, 2e-3]
    assert log == [4_000_000, *["event", "call", "event"] * 2, "wait"]


def test_sets_outgrow_the_cache_three_times(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))
    cuda = torch.device("cuda")
    assert timing.rotation(1 << 30, CPU) == 1
    assert [timing.rotation(size, cuda) for size in (1, 1 << 20, 100 << 20, 1 << 30)] == [512, 150, 2, 2]


def test_own_traffic(monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=227 << 10, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    cuda = torch.device("cuda")

    def counts(backend, device, m, dtype="bfloat16"):
        return [
            bench.accesses(backend, contenders.Case((1, m, c), dtype, "logit"), device) for c in (10, 32000, 262144)
        ]

    assert counts("native", CPU, 5) == counts("copy", cuda, 5) == [7, 7, 7]
    assert counts("native", cuda, 5) == [7, 7, 13]
    assert counts("native", cuda, 8, "float32") == [10, 10, 19]
    properties.major = 8  # no clusters
    assert counts("native", cuda, 5) == [7, 13, 13]
    assert counts("native", cuda, 1) == [3, 3, 5]
    pytest.importorskip("triton")
    assert counts("triton", cuda, 5) == [7, 13, 13]


def test_the_cases_of_a_device():
    def cases(**given):
        cuda = given.pop("cuda", False)
        defaults = dict(op="ensemble_kd", full=False, quick=False, shape=None, dtype=None)
        return bench.cases(SimpleNamespace(**defaults | given), cuda)

    assert [c[:2] for c in cases()[::2]] == [(shape, "float32") for shape in bench.CPU_SHAPES]
    assert {c.dtype for c in cases(cuda=True)} == {"bfloat16"} and len(cases(cuda=True)) == 8
    assert cases(cuda=True, shape=[(1, 2, 3)], dtype=["float16"]) == [
        ((1, 2, 3), "float16", fusion, "MBC") for fusion in ("probability", "logit")
    ]
    sparse, on_gpu = cases(op="sparse_ensemble_kd"), cases(op="sparse_ensemble_kd", cuda=True)
    assert [c.shape for c in sparse[::2]] == bench.SPARSE_SHAPES and {c.dtype for c in on_gpu} == {"bfloat16"}
    assert [c.shape[1:] for c in on_gpu] == [c.shape[1:] for c in sparse] and on_gpu[0].shape[0] > sparse[0].shape[0]
    full = cases(full=True)
    assert len(full) == len({*full}) == 9 * (4 * 4 + 6)
    for (rows, m, classes), dtype, *_ in full:
        assert rows == 64 or 0.9e9 < (m + 2) * rows * classes * getattr(torch, dtype).itemsize < 2.2e9


def test_what_is_missing_is_told(monkeypatch):
    def namespace(device):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(contenders, "namespace", namespace)
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    found, missing = contenders.contenders(True, ["default"])
    assert found.keys() == {"eager:einsum", "eager:sum", "compile:default"}
    assert missing["native"] == missing["triton"] == "no such backend"
    assert "pip install liger-kernel" in missing["liger"]


def synthetic(backends=("native", "triton"), measured=True):
    """A record as a GPU might give it, by way of the bench's own functions."""
    rows = []
    for fusion in ("probability", "logit"):
        for m in (1, 5):
            for c in (100, 1000, 32000):
                result = {name: {"us": 10.0 + i + m - c / 1e4, "error": 1e-3} for i, name in enumerate(backends)}
                result |= {"eager:sum": {"us": 90.0}, "compile:default": {"us": 30.0}, "liger": {"failed": "raises"}}
                result |= {"copy": {"us": 9.0}}
                rows.append(bench.row_of(contenders.Case((64, m, c), "bfloat16", fusion), CPU, result))
    if not measured:
        for row in rows:
            row["contenders"] = {
                n: {k: v for k, v in r.items() if k != "percent_of_copy"}
                for n, r in row["contenders"].items()
                if n != "copy"
            }
    facts = {"environment": info.environment() | {"commit": "c" * 40}, "command": ["bench"], "device": "GPU"}
    return facts | {"driver": "1.2", "rows": rows, "summary": bench.summary_of(rows)}


def test_the_table_says_which_backend_is_faster():
    lines = kernels.bench(synthetic()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert all(len(row) == len(cells[0]) for row in cells)
    assert cells[0][:4] == ["(B, M, C)", "fusion", "native, µs", "triton, µs"] and "liger" not in cells[0]
    assert cells[2][2:4] == ["11", "12"] and cells[2][-1] == "native"
    assert [row[-1] for row in cells[-2:]] == ["12 of 12", "0 of 12"]
    assert "on GPU, driver 1.2" in lines[-1] and "bf16" in lines[-1]


def test_the_share_of_the_bandwidth_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert kernels.bandwidth(synthetic(), tmp_path / "bench.svg") is None
    svg = (tmp_path / "bench.svg").read_text()
    for text in ("native, M = 1", "triton, M = 5", "probability fusion", "logit fusion", "classes C"):
        assert text in svg
    assert (
        "triton"
        not in (kernels.bandwidth(synthetic(("native",)), tmp_path / "cpu.svg") or "")
        + (tmp_path / "cpu.svg").read_text()
    )


def test_a_plot_without_its_figures_is_skipped_with_the_reason(tmp_path):
    assert "was not measured" in kernels.bandwidth(synthetic(measured=False), tmp_path / "bench.svg")
    assert not (tmp_path / "bench.svg").exists()


def test_two_instruction_sets_render_side_by_side(quick):
    record = quick[1]
    narrow, wide = (
        record | {"environment": record["environment"] | {"cpu_capability": isa}} for isa in ("avx2", "avx512")
    )
    table = kernels.side_by_side([narrow, wide]).splitlines()
    assert table[0].index("AVX2") < table[0].index("AVX-512")
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    native = record["rows"][0]["contenders"]["native"]
    assert table[2].count(f" {native['vs_eager']:.1f} | {native['vs_compile']:.1f} ") == 2


def test_without_avx512_all_contenders_are_without():
    if _C.cpu_capability() == "baseline":
        pytest.skip("no AVX2 here")
    code = (
        "import torch; from eekd import _C; from eekd.kernels import bench; bench.limit_to_avx2([])\n"
        "from torch._inductor import config\n"
        "print(torch.backends.cpu.get_cpu_capability(), _C.cpu_capability(), config.cpp.simdlen)"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | bench.AVX2, capture_output=True, text=True)
    assert ran.stdout.split() == ["AVX2", "avx2", "256"], ran.stderr


def test_the_record_of_this_machine_renders(quick, tmp_path):
    pytest.importorskip("matplotlib")
    record = quick[1] | {"environment": quick[1]["environment"] | {"commit": None}}  # of a copy without its .git
    assert kernels.bench(record).count("\n| (") == 4 and "commit unknown." in kernels.bench(record)
    assert kernels.bandwidth(record, tmp_path / "bench.svg") is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--shape", "1,2"], "--shape: must be B,M,C in positive numbers, got 1,2"),
        (["--shape", "1,2,3,4"], "--shape: .*got 1,2,3,4"),
        (["--shape", "0,5,10"], "--shape: .*got 0,5,10"),
        (["--shape", "8,-5,10"], "--shape: .*got 8,-5,10"),
        (["--shape", "a,b,c"], "--shape: .*got a,b,c"),
        (["--op", "sparse_ensemble_kd", "--shape", "8,5,10"], "--shape: must be B,M,C,K .*got 8,5,10"),
        (["--op", "sparse_ensemble_kd", "--shape", "8,5,10,10"], "--shape: .*, K below C, got 8,5,10,10"),
        (["--shape", "8,5,10", "--shape", "8"], "--shape: .*got 8"),
        (["--dtype", "float8"], "--dtype"),
        (["--seconds", "soon"], "--seconds"),
        (["--threads", "many"], "--threads"),
        (["--device", "tpu"], "--device"),
        (["--quik"], "--quik"),
        (["--op", "ensemble_dk"], "ensemble_dk"),
    ],
)
def test_a_bad_argument(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2 and re.search(says, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.bad_input
def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "no CUDA device was found" in capsys.readouterr().err


def test_info_prints_what_was_built_and_what_is_there(capsys):
    info.main([])
    printed = capsys.readouterr().out
    for fact in (eekd.__version__, torch.__version__, _C.torch_version, _C.cpu_capability()):
        assert fact in printed
    names = [line.split()[0] for line in printed.splitlines()]
    assert names == ["eekd", "python", "torch", "triton", "cpu", "cuda", "gpus"]


def test_the_environment_is_json_and_names_the_commit():
    facts = info.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", facts["commit"])


def test_the_commit_of_another_checkout_is_not_ours(monkeypatch, tmp_path):
    monkeypatch.delenv("EEKD_COMMIT", raising=False)
    package = tmp_path / "site-packages" / "eekd"
    package.mkdir(parents=True)
    monkeypatch.setattr(eekd, "__file__", str(package / "__init__.py"))
    assert info.commit() is None


def test_the_environment_names_the_commit_before_git_does(monkeypatch):
    monkeypatch.setenv("EEKD_COMMIT", "a" * 40)
    assert info.commit() == "a" * 40
