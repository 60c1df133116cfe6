"""use_backend: which implementation runs, for how long, and what it says where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from cases import tensors

import eekd.kernels
from eekd import _C, ensemble_kd, use_backend
from eekd.ops import reference
from eekd.ops.backend import BACKENDS, backend_for, namespace

CPU = torch.device("cpu")


@pytest.fixture
def spied(monkeypatch):
    """Counts the calls of reference.ensemble_kd."""
    calls = []
    formula = reference.ensemble_kd
    monkeypatch.setattr(reference, "ensemble_kd", lambda *args, **kwargs: calls.append(1) or formula(*args, **kwargs))
    return calls


def test_the_cpu_runs_native_kernels(spied):
    assert backend_for(CPU) == "native" and namespace(CPU) is torch.ops.eekd
    ensemble_kd(**tensors(2, 3, 4))
    assert not spied


def test_torch_func_and_vmap_are_computed_by_the_formulas(spied):
    x = tensors(4, 3, 5)
    student, snapshots, labels = x["student_logits"].detach(), x["snapshot_logits"], x["labels"]

    def loss(row, label):
        return ensemble_kd(row[None], snapshots[:, :1], label[None]).loss

    each = torch.vmap(torch.func.grad(loss))(student, labels)
    assert spied and backend_for(CPU) == "native"
    student.requires_grad_()
    loss_of_all = ensemble_kd(student, snapshots[:, :1].expand(3, 4, 5), labels, reduction="sum").loss
    torch.testing.assert_close(each, torch.autograd.grad(loss_of_all, student)[0])


def test_a_backend_is_used_inside_the_block_and_not_after(spied):
    x = tensors(2, 3, 4)
    with use_backend("reference"):
        assert backend_for(CPU) == "reference"
        ensemble_kd(**x)
        with use_backend("native"):
            ensemble_kd(**x)
        ensemble_kd(**x)
    ensemble_kd(**x)
    assert len(spied) == 2


def test_an_exception_leaves_the_block_as_it_was():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend_for(CPU) == "native"


def test_a_block_may_be_a_decorator():
    @use_backend("reference")
    def inside():
        return backend_for(CPU)

    assert [inside(), backend_for(CPU), inside()] == ["reference", "native", "reference"]


def test_backward_runs_where_the_forward_ran():
    x = tensors(2, 3, 4)
    x["student_logits"].requires_grad_()
    loss = ensemble_kd(**x).loss
    with use_backend("reference"):
        loss.backward()
    assert x["student_logits"].grad is not None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name", ["cuda", "Native", "", " native", "eager", "native,triton", None, 0, True, b"native", ["native"], CPU]
)
def test_an_unknown_backend(name):
    with pytest.raises(ValueError) as caught, use_backend(name):
        pass
    assert str(caught.value) == f"backend must be one of 'native', 'triton', 'reference', got {name!r}"
    assert backend_for(CPU) == "native"


@pytest.mark.bad_input
def test_a_backend_must_be_named():
    with pytest.raises(TypeError, match="name"), use_backend():
        pass


@pytest.mark.bad_input
@pytest.mark.parametrize("device", ["mps", "xpu", "vulkan"])
def test_a_device_without_kernels(device):
    with use_backend("native"), pytest.raises(RuntimeError, match=f'native backend .*not on {device}; use "reference"'):
        namespace(torch.device(device))


@pytest.mark.bad_input
def test_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(_C, "cuda_version", "")
    with use_backend("native"), pytest.raises(RuntimeError, match="without CUDA; install nvcc"):
        namespace(torch.device("cuda"))


@pytest.mark.bad_input
@pytest.mark.parametrize("older", ["del eekd._C.ops_version", "eekd._C.ops_version = 3"])
def test_a_library_that_is_older_than_the_code(older):
    code = f"import torch, eekd._C; {older}; import eekd.ops"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == (
        "ImportError: eekd's compiled kernels are of another version than its Python code; build them again with "
        "`pip install -e .`"
    )


@pytest.mark.bad_input
@pytest.mark.parametrize("missing", ["triton", "eekd.kernels.ensemble_kd"])
def test_a_python_without_triton(monkeypatch, missing):
    for module in ("eekd.kernels.ensemble_kd", "eekd.kernels.launch"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(eekd.kernels, "ensemble_kd", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with use_backend("triton"), pytest.raises(RuntimeError, match="needs Triton .*`pip install triton`"):
        ensemble_kd(**tensors(2, 3, 4))


@pytest.mark.bad_input
def test_triton_on_a_cpu_without_its_interpreter(monkeypatch):
    kernels = pytest.importorskip("eekd.kernels.ensemble_kd")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ensemble_kd(**tensors(2, 3, 4))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_is_missing_never_runs_as_another(name, spied):
    x = tensors(2, 3, 4)
    with use_backend(name):
        try:
            ensemble_kd(**x)
        except RuntimeError as error:
            assert name == "triton" and "triton" in str(error)
    assert bool(spied) == (name == "reference")


def info(capability: str) -> subprocess.CompletedProcess:
    """`eekd info` with EEKD_CPU_CAPABILITY set."""
    environment = os.environ | {"EEKD_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, "-m", "eekd.info"], env=environment, capture_output=True, text=True)


def test_the_environment_limits_the_instruction_set():
    done = info("baseline")
    assert done.returncode == 0 and ", kernels use baseline, " in done.stdout, done


@pytest.mark.bad_input
def test_an_unknown_instruction_set_is_refused_in_one_sentence():
    done = info("avx3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: EEKD_CPU_CAPABILITY must be baseline, avx2 or avx512, and be in this build and processor, got avx3\n"
    )
