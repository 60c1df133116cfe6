"""Gradients of ensemble_kd and sparse_ensemble_kd: right, scaled, computed once and only where asked for."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from cases import ATTENTIONS, DTYPES, OBJECTIVES, Calls, kd, readings, sizes, tensors
from numerics import DIFFERENTIABLE, check, check_by_differences, evaluate, exact
from torch.nn import functional as F

from eekd import ensemble_kd


@sizes((4, 3, 6), (4, 3, 6, 3))
@pytest.mark.parametrize("attention", ["scores", "query"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@readings
def test_gradcheck(backend, device, size, attention, reduction, fusion, objective):
    x = tensors(*size, device=device, dtype=torch.float64, attention=attention, width=2)
    x["labels"][1] = -100
    student = ["student_logits"]
    attention = [name for name in ("scores", "query", "keys") if name in x]
    options = {"fusion": fusion, "attention_objective": objective, "reduction": reduction, "alpha": 0.3}
    # With "label" the target is a constant to `loss`, which finite differences cannot know: one output each.
    checks = {"loss": student, "attention_loss": attention} if objective == "label" else {"loss": student + attention}
    check_by_differences(x, checks, **options)


@sizes((9, 3, 100), (9, 3, 100, 30))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@readings
def test_upstream_gradients_scale(backend, device, size, dtype, reduction, fusion, objective):
    for attention in ("scores", "query"):
        x = tensors(*size, device=device, dtype=dtype, attention=attention)
        x["labels"][4] = -100
        upstream = (0.37, -2.5)
        if reduction == "none":
            upstream = tuple(g * torch.arange(9.0, device=device) for g in upstream)
        check(x, upstream=upstream, reduction=reduction, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_scale_saves_the_small_gradients_of_fp16(backend, device, reduction):
    x = tensors(1024, 1, 1000, device=device, dtype=torch.float16)
    options = {"reduction": reduction, "upstream": (2.0**14, 2.0**14) if reduction == "mean" else (8.0, 8.0)}
    got = evaluate(ensemble_kd, x, **options)["d_student_logits"].double()
    truth = exact(x, **options)["d_student_logits"]
    others = F.one_hot(x["labels"], 1000) == 0  # the columns of the labels have large gradients
    assert (got - truth)[others].norm() < 1e-3 * truth[others].norm()


@readings
def test_each_output_alone(backend, device, fusion, objective):
    x = tensors(9, 3, 20, device=device)
    student, scores = x["student_logits"].requires_grad_(), x["scores"].requires_grad_()
    out = ensemble_kd(**x, fusion=fusion, attention_objective=objective)
    moved_by = {
        name: [
            grad is not None
            for grad in torch.autograd.grad(getattr(out, name), (student, scores), retain_graph=True, allow_unused=True)
        ]
        for name in ("loss", "attention_loss")
        if getattr(out, name).requires_grad
    }
    if objective == "kl":
        assert moved_by == {"loss": [True, True]}
    else:
        assert moved_by == {"loss": [True, False], "attention_loss": [False, True]}
    assert not out.weights.requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_only_what_can_be_trained_requires_a_gradient(backend, device, objective, student, scores, labels):
    if scores and not labels and objective == "label":
        pytest.skip("an error, tested as such")
    x = tensors(4, 3, 5, device=device, labels=labels)
    x["student_logits"].requires_grad_(student)
    x["scores"].requires_grad_(scores)
    out = ensemble_kd(**x, attention_objective=objective)
    assert out.loss.requires_grad == (student or (scores and objective == "kl"))
    assert out.attention_loss.requires_grad == (scores and objective == "label")


def test_backward_again_and_again(backend, device):
    x = tensors(9, 3, 20, device=device)
    leaves = x["student_logits"].requires_grad_(), x["scores"].requires_grad_()
    out = ensemble_kd(**x)
    total = out.loss + out.attention_loss
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for times in (1, 2, 3):
        total.backward(retain_graph=True)
        for leaf, grad in zip(leaves, kept, strict=True):
            torch.testing.assert_close(leaf.grad, times * grad)
    for leaf in leaves:  # as an optimiser's clipping does
        leaf.grad.zero_()
    total.backward()
    for leaf, grad in zip(leaves, kept, strict=True):
        assert torch.equal(leaf.grad, grad)


@sizes((4, 3, 5), (4, 3, 20, 5))
@pytest.mark.parametrize("of", ["loss", "attention_loss"])
def test_the_second_derivative_is_refused(kernels, device, size, of):
    x = tensors(*size, device=device)
    leaf = x["student_logits" if of == "loss" else "scores"].requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative.*create_graph"):
        torch.autograd.grad(getattr(kd(**x), of), leaf, create_graph=True)


GRADIENTS = ("d_student", "d_scores", "d_query", "d_keys")


@sizes((4, 3, 5), (4, 3, 20, 5))
@pytest.mark.parametrize("attention", ATTENTIONS)
@readings
def test_gradients_not_asked_for_are_not_computed(kernels, device, size, attention, fusion, objective):
    x = tensors(*size, device=device, attention=attention)
    names = [name for name in ("scores", "query", "keys") if name in x]
    for student, attends, asked in itertools.product((True, False), repeat=3):
        x["student_logits"].requires_grad_(student)
        for name in names:
            x[name].requires_grad_(attends)
        with Calls() as calls, torch.set_grad_enabled(asked):
            out = kd(**x, fusion=fusion, attention_objective=objective)
        ((op, args),) = calls.own
        written = {"d_student"} if args["wants_student"] else set()
        written |= {f"d_{name}" for name in names} if args["wants_attention"] else set()
        expected = {"d_student"} if student else set()
        expected |= {f"d_{name}" for name in names} if attends else set()
        assert op == ("sparse_" if "indices" in x else "") + "ensemble_kd_fwd"
        assert written == (expected if asked else set())
        moved = student or (attends and bool(names) and objective == "kl")
        assert out.loss.requires_grad == (asked and moved)


def launches(kernels, device):
    """Whether the backward is a launch that scales in place; the native kernels leave it to torch on CPU."""
    return kernels == "triton" or device != "cpu"


def test_backward_scales_and_nothing_else(kernels, device):
    x = tensors(4, 3, 5, device=device)
    x["student_logits"].requires_grad_()
    for scale, most in ((1.0, 0), (3.0, 1)):
        loss, upstream = ensemble_kd(**x).loss, torch.tensor(scale, device=device)
        with Calls() as calls:
            (grad,) = torch.autograd.grad(loss, x["student_logits"], upstream)
        if launches(kernels, device):
            ((name, args),) = calls.own
            assert name == "ensemble_kd_bwd" and args["d_student"].data_ptr() == grad.data_ptr()
            most = 0
        else:
            assert not calls.own
        work = [name for name in calls.others if "detach" not in name and "_local_scalar_dense" not in name]
        assert len(work) <= most, work


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("attention", ["scores", "query"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_graph_that_is_kept_keeps_its_gradients(kernels, device, dtype, reduction, attention, objective):
    x = tensors(9, 3, 20, device=device, dtype=dtype, attention=attention)
    leaves = [x[name].requires_grad_() for name in DIFFERENTIABLE if name in x]
    out = ensemble_kd(**x, reduction=reduction, attention_objective=objective)
    total = (torch.arange(out.loss.numel(), device=device) + 3) * (out.loss + 2 * out.attention_loss)
    total = total.sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    with Calls() as calls:
        third = torch.autograd.grad(total, leaves)
    assert len(calls.own) == launches(kernels, device)  # one launch for all gradients
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and len({t.data_ptr() for t in (a, b, c)}) == 3


def test_a_loss_without_a_gradient_gives_none(kernels, device):
    x = tensors(9, 3, 20, device=device)
    student, scores = x["student_logits"].requires_grad_(), x["scores"].requires_grad_()
    for name, moved in (("loss", [True, False]), ("attention_loss", [False, True])):
        grads = torch.autograd.grad(3 * getattr(ensemble_kd(**x), name), (student, scores), allow_unused=True)
        assert [grad is not None for grad in grads] == moved
