"""How M frozen classifiers of one kind run on the same images: fast on a CPU, or from host memory on a GPU."""

import copy
import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval

from eekd import parallel
from eekd.models.normalization import Renormalize
from eekd.snapshots.features import LastFeatures, Tap


class BatchNormFolded:
    """Logits and features of M frozen classifiers on a CPU: `folded(captures, x)`, or None where it had better not.

    Of each model a copy is made whose batch norms are folded into the convolutions before them, with weights in
    channels_last and, under autocast, in its dtype. The outputs are the models' own up to rounding. Of the ways in
    results/forward.py without a compiler it is the fastest.

    None, and nothing is changed, for a model that torch.fx cannot trace, that has hooks, is in training mode or
    wrapped, or whose copy disagrees with it on noise. The copies are made again where a module, parameter or buffer
    was replaced or written to; what goes through `.data` is not seen.
    """

    def __init__(self):
        self._seen: tuple[list, list] = [], []
        self._graphs: dict[torch.dtype | None, list[fx.GraphModule]] = {}

    def __reduce__(self):
        return BatchNormFolded, ()  # copied and pickled empty

    @torch.no_grad()
    def __call__(self, captures: Sequence[LastFeatures], *inputs, **named) -> list[tuple[Tensor, Tensor | None]] | None:
        if len(inputs) != 1 or named:
            return None
        [x] = inputs
        plain = type(x) is Tensor and x.device.type == "cpu" and x.is_floating_point() and x.ndim == 4 and len(x)
        if not plain or torch.compiler.is_compiling():
            return None
        try:
            seen = _seen([capture.model for capture in captures])
            if not (_same(seen[0], self._seen[0]) and seen[1] == self._seen[1]):
                self._seen, self._graphs = seen, {}
                self._graphs = {None: [_fold(capture, x) for capture in captures]}
            low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            if low and None in self._graphs and low not in self._graphs:  # autocast casts frozen weights at every call
                self._graphs[low] = [_cast(graph, low) for graph in self._graphs[None]]
            x = _channels_last(x)
            return [_run(graph, x) for graph in self._graphs[low]] if self._graphs else None
        except Exception:  # whatever is wrong, the models themselves say it better
            return None


class HostOffloaded:
    """M models in host memory run on a GPU one after another: `for outputs in offloaded(device, images): ...`.

    The device holds the weights of two: while one runs, a stream of its own copies those of the next. On a CPU the
    same happens without streams.
    """

    def __init__(self, captures: Sequence[LastFeatures]):
        self.captures = captures
        self.slots: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self.stream: torch.cuda.Stream | None = None
        self.ready: list[Any] = [None, None]  # an event: the slot's weights have come
        self.free: list[Any] = [None, None]  # an event: the slot's model has run

    def __reduce__(self):
        return HostOffloaded, (self.captures,)  # copied and pickled without slots

    def __call__(self, device: torch.device, *inputs, **named) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The snapshots' outputs, each in turn."""
        cuda = device.type == "cuda"
        if cuda and (self.stream is None or self.stream.device != device):
            self.stream = torch.cuda.Stream(device)
        self._fetch(0, device)
        for m, capture in enumerate(self.captures):
            if m + 1 < len(self.captures):
                self._fetch(m + 1, device)
            if cuda:
                torch.cuda.current_stream(device).wait_event(self.ready[m % 2])
            model = capture.model
            capture.model = functools.partial(_call, model, self.slots[m % 2])
            try:
                outputs = capture(*inputs, **named)
            finally:
                capture.model = model
            if cuda:
                self.free[m % 2] = torch.cuda.current_stream(device).record_event()
            yield outputs

    def _fetch(self, m: int, device: torch.device) -> None:
        """Copies the weights of model m into its slot when the model before it there has run."""
        model, slot = self.captures[m].model, self.slots[m % 2]
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        fits = slot.keys() == tensors.keys() and all(_like(slot[name], t, device) for name, t in tensors.items())
        if not fits:
            slot.clear()
            slot |= {name: torch.empty_like(t, device=device, requires_grad=False) for name, t in tensors.items()}
        if device.type == "cuda":
            if not fits:  # the memory may still be in use by what was queued before
                self.stream.wait_stream(torch.cuda.current_stream(device))
            elif self.free[m % 2]:
                self.stream.wait_event(self.free[m % 2])
        with torch.cuda.stream(self.stream) if device.type == "cuda" else nullcontext():
            for name, tensor in tensors.items():
                slot[name].copy_(tensor, non_blocking=True)
            if device.type == "cuda":
                self.ready[m % 2] = self.stream.record_event()


class RankSharded:
    """M models spread over the processes of torch.distributed, each of which has images of its own.

    Every process runs its models on the images of all: an all-gather brings them, an all-to-all takes the outputs
    back. What is exchanged is padded to the largest batch and the largest share.
    """

    def share(self, models: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """This process's models; one that is another's too, whose outputs are thrown away, where there are too few."""
        rank = parallel.rank()
        return tuple(models[rank :: parallel.world_size()]) or (models[rank % len(models)],)

    def all_images(self, x: Tensor) -> Tensor:
        """(size · B, ...): the images of all processes, with B the largest of their batches."""
        [self.most], self.rows = parallel.max_across_processes(len(x)), len(x)
        padded = x.new_zeros(self.most, *x.shape[1:])
        padded[: len(x)] = x
        every = padded.new_empty(parallel.world_size() * self.most, *x.shape[1:])
        torch.distributed.all_gather([*every.chunk(parallel.world_size())], padded, parallel.group_of(padded))
        return _channels_last(every) if x.is_contiguous(memory_format=torch.channels_last) else every

    def back(self, own: Tensor, count: int) -> Tensor:
        """(M, B, W) for this process's images, of what its models said of all, (models, size · B, W)."""
        size, width = parallel.world_size(), own.shape[2]
        share = -(-count // size)
        sent = own.new_zeros(size, share, self.most, width)
        sent[:, : len(own)] = own.view(len(own), size, self.most, width).transpose(0, 1)
        came = torch.empty_like(sent)
        torch.distributed.all_to_all_single(came, sent, group=parallel.group_of(sent))
        return came.transpose(0, 1).flatten(0, 1)[:count, : self.rows]  # model j of process r is snapshot j · size + r


def _call(model: nn.Module, tensors: dict[str, Tensor], *inputs, **named):
    return functional_call(model, tensors, inputs, named)


def _like(a: Tensor, b: Tensor, device: torch.device) -> bool:
    return a.device == device and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def pinned(model: nn.Module) -> None:
    """Brings a model to host memory: page-locked, from where a GPU copies while it computes, where there is one."""
    model.cpu()
    if torch.cuda.is_available():
        model._apply(lambda tensor: tensor.pin_memory())


def _seen(models: Sequence[nn.Module]) -> tuple[list, list]:
    """All that the outputs depend on: modules, hooks and tensors; where the tensors lie and how often they changed."""
    things, states, modules = [], [], [*models]
    while modules:
        module = modules.pop()
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        things += module, *module._forward_hooks.values(), *module._forward_pre_hooks.values(), *tensors
        states.append(module.training)
        for tensor in tensors:
            states += tensor._version, tensor.data_ptr()
        modules += [child for child in module._modules.values() if child is not None]
    return things, states


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _fold(capture: LastFeatures, x: Tensor) -> fx.GraphModule:
    """x -> logits, features of the captured model, batch norms folded; an error where that is not the same."""
    model = capture.model
    normalize = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Renormalize)]
    for module in model.modules():
        hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
        hooks = [hook for hook in hooks if not (module is model and hook in normalize)]
        if module.training or not all(isinstance(hook, Tap) for hook in hooks):
            raise ValueError("a graph would not see the module's hooks or training mode")
    graph = fx.symbolic_trace(copy.deepcopy(model))
    modules: dict[str, Any] = dict(graph.named_modules())
    output = next(node for node in graph.graph.nodes if node.op == "output")
    if capture.layer is None:
        output.args = ((output.args[0], None),)
    else:
        [head] = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == capture.layer]
        with graph.graph.inserting_before(output):
            output.args = ((output.args[0], graph.graph.call_method("flatten", (head.args[0], 1))),)
    for norm in list(graph.graph.nodes):
        before = norm.args[0] if norm.args else None
        if not (_is(norm, nn.BatchNorm2d, modules) and _is(before, nn.Conv2d, modules) and len(before.users) == 1):
            continue
        statistics = modules[norm.target]
        if statistics.running_mean is not None:
            name = f"folded_{norm.name}"  # new, for the convolution may be called elsewhere too
            graph.add_submodule(name, fuse_conv_bn_eval(modules[before.target], statistics))
            before.target = name
            norm.replace_all_uses_with(before)
            graph.graph.erase_node(norm)
    graph.delete_all_unused_submodules()
    graph.recompile()
    for module in graph.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    for hook in normalize:
        graph.register_forward_pre_hook(hook)
    graph.to(memory_format=torch.channels_last)
    noise = torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        noise = noise.to(next(model.parameters()).dtype)
        for mine, own in zip(_run(graph, _channels_last(noise)), capture(noise), strict=True):
            if own is None:
                continue
            scale = own.abs().max().item()
            torch.testing.assert_close(mine, own, rtol=0, atol=scale * torch.finfo(own.dtype).eps ** 0.5)
    return graph


def _run(graph: fx.GraphModule, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The graph's outputs; an error is raised, where a GraphModule's own call would also print a traceback."""
    return nn.Module.__call__(graph, x)


def _is(node: object, kind: type, modules: dict[str, nn.Module]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and type(modules[str(node.target)]) is kind


def _cast(graph: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with the weights that autocast would cast at each call."""
    graph = copy.deepcopy(graph)
    for module in graph.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(dtype)
    return graph


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
