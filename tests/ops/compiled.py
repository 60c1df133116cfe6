"""A training step that torch compiles, and whether it computes the same."""

import torch
import torch._dynamo.testing
from cases import kd
from numerics import evaluate


def compiled(compiler="aot_eager", dynamic=None):
    """A training step's loss, compiled without graph breaks, and the counter of its compilations."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def step(**arguments):
        out = kd(**arguments)
        return 2 * out.loss + out.attention_loss, out.weights, out.attention_loss

    return step, torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic), counter


def assert_compiled_agrees(step, fast, x, **options):
    a, b = evaluate(step, x, **options), evaluate(fast, x, **options)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
