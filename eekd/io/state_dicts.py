"""State dicts of anybody's models: found in a checkpoint, freed of what wrappers add to names, copied into a model."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

from torch import Tensor, nn

from eekd.io.files import printable

NESTS = "state_dict", "model_state_dict", "model", "module", "net"  # where others keep their state_dict
WRAPPERS = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"  # torch's, anywhere in a name
COUNTERS = "total_ops", "total_params"  # buffers that thop's profile leaves in a model
NO_WEIGHTS = re.compile("optim|sched|scaler|callback|rng|random|loop|hyper|metric", re.IGNORECASE)
DEPTH = 4  # of dicts in dicts


def find_state(content, source: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """The state_dict in what a checkpoint holds: all of it, or what lies under a key.

    Without `entry` that is the first of "state_dict", "model_state_dict", "model", "module", "net", else the only one
    there is; a warning names the others. `entry` names a key, or the first part of the names: "ema" finds "model_ema"
    and "ema.layer.weight". ValueError where there is none, or more than one.
    """
    states = dict(_states(content, set()))
    if not states:
        got = f"a dict of {some(map(repr, content))}" if isinstance(content, dict) else kind_of(content)
        raise ValueError(f"{source} must hold a state_dict of tensors, alone or under {', '.join(NESTS)}; got {got}")
    if entry is not None:
        return _entry(states, source, entry)
    taken = next((name for name in _by_nests(states)), None)
    if taken is None and len(states) > 1:
        raise ValueError(f"{source} holds weights under {some(states)}: choose by entry= (--checkpoint-entry)")
    taken = next(iter(states)) if taken is None else taken
    if len(states) > 1:
        others = some(name for name in states if name != taken)
        warnings.warn(f"{source} holds weights under {taken} and {others}: took {taken}; entry= chooses", stacklevel=2)
    return states[taken]


def _states(value, seen: set[int], name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict of tensors in `value`, by its keys joined with dots; each dict once, for a file can nest in itself."""
    if not isinstance(value, Mapping) or id(value) in seen or name.count(".") >= DEPTH:
        return
    seen.add(id(value))
    if value and all(isinstance(key, str) and isinstance(x, Tensor) for key, x in value.items()):
        yield name, dict(value)
        return
    for key, inner in value.items():
        if isinstance(key, str) and not NO_WEIGHTS.search(key):
            yield from _states(inner, seen, f"{name}.{key}" if name else key)


def _by_nests(states: dict) -> list[str]:
    """The names whose every part is in NESTS, in the order of NESTS."""
    places = {name: [NESTS.index(part) if part in NESTS else -1 for part in name.split(".")] for name in states}
    return sorted((name for name in states if not name or min(places[name]) >= 0), key=lambda name: places[name])


def _entry(states: dict[str, dict[str, Tensor]], source: str | Path, entry: str) -> dict[str, Tensor]:
    keys, prefixes = {name: state for name, state in states.items() if name}, {}
    for key, state in states.items():
        for name, tensor in state.items():
            first, dot, rest = name.partition(".")
            if dot:
                prefixes.setdefault(f"{key}.{first}" if key else first, {})[rest] = tensor
    word = re.compile(rf"(^|[._]){re.escape(entry)}([._]|$)")
    for candidates in (keys, prefixes):
        matches = [name for name in candidates if name == entry] or [name for name in candidates if word.search(name)]
        if len(matches) > 1:
            raise ValueError(f"{source} has more than one entry {entry!r}: {some(matches)}")
        if matches:
            return candidates[matches[0]]
    raise ValueError(f"{source} has no entry {entry!r}; it has {some([*keys, *prefixes])}")


def bare_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the bare model's names, without what torch's wrappers add.

    These are torch.compile, DistributedDataParallel, DataParallel, FSDP, activation checkpoints and AveragedModel.
    """
    state = {".".join(part for part in name.split(".") if part not in WRAPPERS): x for name, x in state.items()}
    if any(name.startswith("module.") for name in state):  # AveragedModel counts beside its module
        state.pop("n_averaged", None)
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `model`, both wrapped or not; ValueError, and nothing copied, where it does not fit.

    It fits if it has the model's names, and for each the model's shape and kind of number. One prefix that all the
    model's names have in `state`, "model." or "student." say, is taken off; a warning says so, and what it leaves out.
    As in torch, `num_batches_tracked` may be missing, and a tensor that the model shares may come once. `source` is
    where it came from, for the error.
    """
    own, state = bare_names(model.state_dict()), bare_names(state)
    state = {name: x for name, x in state.items() if name in own or name.rpartition(".")[2] not in COUNTERS}
    state = _with_twins(model, own, _of_old_weight_norm(without_prefix(own, state, source), own), source)
    if reasons := mismatch(own, state):
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {reasons}")
    plain = {name: x for name, x in state.items() if type(x) in (Tensor, nn.Parameter) and x.is_floating_point()}
    if holes := [name for name, x in plain.items() if (x.isnan() | x.isposinf()).any()]:
        warnings.warn(
            f"{source} holds NaN or infinity in {some(holes)}: was it saved after the training diverged?", stacklevel=2
        )
    model.load_state_dict({name: state[bare] for name, bare in zip(model.state_dict(), own, strict=True)})


def mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Why `state` does not fit a model whose state_dict is `own`; "" where it does."""
    both = [(name, state[name], own[name]) for name in own if name in state]
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(got.shape)} for {tuple(want.shape)}" for name, got, want in both if got.shape != want.shape
        ],
        "of another kind": [
            f"{name} {got.dtype} for {want.dtype}"
            for name, got, want in both
            if got.is_floating_point() != want.is_floating_point()
        ],
        "of another layout": [f"{name} {got.layout}" for name, got, want in both if got.layout != want.layout],
    }
    return "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)


def without_prefix(own: dict[str, Tensor], state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """`state` without the one prefix under which it has all the names of `own`; as it is where there is none."""
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    if needed <= state.keys():
        return state
    shapes, counts = {name: x.shape for name, x in own.items()}, Counter()
    for name, tensor in state.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            if shapes.get(".".join(parts[i:])) == tensor.shape:
                counts[".".join(parts[:i]) + "."] += 1
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == most and 2 * count > len(needed)]
    if len(prefixes) > 1:
        raise ValueError(f"{source} fits under {some(prefixes)}: choose by entry= (--checkpoint-entry)")
    if not prefixes:
        return state
    [prefix] = prefixes
    left_out = [name for name in state if not name.startswith(prefix)]
    more = f", and {len(left_out)} others were left out: {some(left_out)}" if left_out else ""
    warnings.warn(f"{source}: took the entries under {prefix!r}{more}", stacklevel=3)
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def _of_old_weight_norm(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the names of torch's new weight_norm where the model has it and the file the old ones."""
    renamed = {}
    for name, tensor in state.items():
        if name not in own and name[-2:] in ("_g", "_v"):
            layer, dot, leaf = name[:-2].rpartition(".")
            new = f"{layer}{dot}parametrizations.{leaf}.original{'gv'.index(name[-1])}"
            name = new if new in own else name
        renamed[name] = tensor
    return renamed


def _with_twins(
    model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor], source: str | Path
) -> dict[str, Tensor]:
    """`state` with what may be missing: counts of batch norm, as the model has them, and other names of one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in zip(own, model.state_dict(keep_vars=True).values(), strict=True):
        names.setdefault(id(tensor), []).append(name)
    state = dict(state)
    for twins in names.values():
        present = [name for name in twins if name in state]
        for name in twins if present else ():
            state.setdefault(name, state[present[0]])
            first, other = state[present[0]], state[name]
            if len(twins) > 1 and (first.shape != other.shape or not first.equal(other)):
                raise ValueError(f"{source} has two tensors, {present[0]} and {name}, where the model has one")
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    return state


def kind_of(value) -> str:
    """What a value is, for an error."""
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor on {value.device}"
    return f"a {type(value).__name__}"


def some(names) -> str:
    """The first three of the names, made printable, and how many more there are."""
    names = list(names)
    shown = ", ".join(printable(name)[:100] for name in names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
