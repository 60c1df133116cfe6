"""M frozen snapshots of a trained model, asked together."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from eekd import parallel
from eekd.io.files import first_line, read_json
from eekd.io.state_dicts import load_state
from eekd.io.tensors import load_weights
from eekd.kept_code import setup_of, stand_in
from eekd.models.outputs import take_output
from eekd.snapshots.features import LastFeatures
from eekd.snapshots.files import checkpoint_files, checkpoint_sha256
from eekd.snapshots.forward import BatchNormFolded, HostOffloaded, RankSharded, pinned
from eekd.snapshots.manifest import MANIFEST, read_entries
from eekd.snapshots.wrappers import frozen_copy

Place = Literal["device", "cpu", "ranks"]


class SnapshotEnsemble(nn.Module):
    """M frozen copies of trained models, which run on the same inputs.

        ensemble = SnapshotEnsemble.load("runs/teacher")
        logits, features = ensemble(images)  # (M, B, C), (M, B, D)

    The copies stay in eval mode and never take a gradient. They are not submodules: if the ensemble is an attribute of
    a student, the student's parameters, state_dict and train() do not include them. Moving or casting the student
    (`to`, `cuda`, `half`, channels_last) does move or cast them.

    Args:
        models: the trained nn.Modules, with equal C and D. They are copied without DistributedDataParallel,
            AveragedModel and torch.compile, so yours do not change.
        layer: the name of the layer whose input is the feature; None takes the last nn.Linear, as LastFeatures does.
        features: whether to return features. If False they are None, and the models need no such layer.
        reuse: whether a call may return tensors whose memory the next call overwrites.
        snapshots_on: where the weights are. "device": on the device. "cpu": in host memory, also after `to`; they are
            copied to the images' device two models at a time, the next one while one runs. "ranks": spread over the
            processes of torch.distributed. Each process runs every size-th model, from its rank on, for the images of
            all processes, which must call together. A single model is not spread.

    On a CPU the models run as `eekd.snapshots.forward.BatchNormFolded` says, if possible.

    Attributes:
        models: the M copies, or this process's share of them.
        hashes: SHA-256 of the M files they came from, () for models from memory.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        layer: str | None = None,
        *,
        features: bool = True,
        reuse: bool = False,
        snapshots_on: Place = "device",
    ):
        super().__init__()
        if snapshots_on not in get_args(Place):
            raise ValueError(f"snapshots_on must be device, cpu or ranks, got {snapshots_on!r}")
        if isinstance(models, nn.Module):
            raise TypeError(f"models must be a list of nn.Modules, got one {type(models).__name__}")
        # nn.Module does not look into tuples
        frozen = tuple(frozen_copy(model) for model in models)
        if not frozen:
            raise ValueError("models must hold at least one nn.Module, got none")
        self._count, self._reuse = len(frozen), reuse
        several = self._count > 1 and parallel.world_size() > 1
        self._sharded = RankSharded() if snapshots_on == "ranks" and several else None
        self.models = self._sharded.share(frozen) if self._sharded else frozen
        self.hashes: tuple[str, ...] = ()
        self._captures = tuple(LastFeatures(model, layer, features=features) for model in self.models)
        self._memory: list[Tensor | None] = [None, None]  # of logits, of features
        self._folded = BatchNormFolded()
        self._offloaded = HostOffloaded(self._captures) if snapshots_on == "cpu" else None
        if self._offloaded:
            for model in self.models:
                pinned(model)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        factory: Callable[[], nn.Module] | None = None,
        device: str | torch.device = "cpu",
        which: Sequence[int] | None = None,
        layer: str | None = None,
        *,
        features: bool = True,
        reuse: bool = False,
        snapshots_on: Place = "device",
    ) -> "SnapshotEnsemble":
        """The snapshots that a SnapshotRecorder wrote to `directory`, each file checked against its hash.

        `factory()` makes the model; None builds it from the manifest's spec. A spec may name a Python file, which is
        then run, or its copy in the folder where it is missing: give a factory for folders you do not trust. `which`
        picks snapshots by index, -1 the last; None takes all of a finished run. FileNotFoundError or ValueError names
        the file that is missing, damaged, or does not fit the model, or the manifest of a run that has not ended.
        """
        path, (entries, spec) = Path(directory) / MANIFEST, read_entries(directory, which)
        if factory is None and spec is None:
            raise ValueError(f"factory must be given where {path} names no architecture (its spec is null), got None")
        if factory is None and (record := path.with_name("snapshots.json")).exists():
            stand_in(path.parent, setup_of(read_json(record)))

        def build() -> nn.Module:
            from eekd import models

            try:
                return models.build(**(spec or {}))
            except (OverflowError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} has a spec that cannot be built: {first_line(error)}") from error

        files = [path.with_name(entry["file"]) for entry in entries]
        hashes = [entry["sha256"] for entry in entries]
        options = {"features": features, "reuse": reuse, "snapshots_on": snapshots_on}
        output = (spec or {}).get("output")
        own = (lambda: take_output(factory(), output)) if callable(factory) and output else factory
        return cls.from_files(files, own or build, device, layer, sha256=hashes, **options)

    @classmethod
    def from_files(
        cls,
        paths: str | Path | Sequence[str | Path],
        factory: Callable[[], nn.Module] | None = None,
        device: str | torch.device = "cpu",
        layer: str | None = None,
        *,
        load: Callable[[Path], nn.Module] | None = None,
        entry: str | None = None,
        sha256: Sequence[str] | None = None,
        features: bool = True,
        reuse: bool = False,
        snapshots_on: Place = "device",
    ) -> "SnapshotEnsemble":
        """Checkpoints of any trainer, for the model that `factory()` makes, or as models that `load(path)` returns.

            SnapshotEnsemble.from_files("outputs", load=AutoModelForImageClassification.from_pretrained)

        `paths` are files and folders, which `eekd.snapshots.files.checkpoint_files` sorts in the order of training.
        With a factory nothing is unpickled. `eekd.io.tensors.load_weights` says what is read, and which part of a file
        `entry`, such as "ema", chooses. A `load` function is yours, and eekd does not check what it does. `sha256` are
        the hashes that the checkpoints must have (`hashes`). Errors as in `SnapshotEnsemble.load`.
        """
        name, function = ("factory", factory) if load is None else ("load", load)
        if not callable(function):
            raise TypeError(f"{name} must be a function that makes a model, got {type(function).__name__}")
        for name, value in {"factory": factory, "entry": entry}.items():
            if load and value is not None:
                raise ValueError(f"{name} must be None where load reads the models, got {value!r}")
        files = checkpoint_files(paths, folders=load is not None)
        hashes = tuple(map(checkpoint_sha256, files) if sha256 is None else sha256)
        if len(hashes) != len(files):
            raise ValueError(f"sha256 must hold a hash for each of {len(files)} paths, got {len(hashes)}")

        def models():
            model = factory() if factory else None
            for path, digest in zip(files, hashes, strict=True):
                if load:
                    if sha256 is not None and (actual := checkpoint_sha256(path)) != digest:
                        raise ValueError(f"{path} was changed or damaged: its SHA-256 must be {digest}, got {actual}")
                    model = load(path)
                if not isinstance(model, nn.Module):
                    name = "load" if load else "factory"
                    raise TypeError(f"{name} must return an nn.Module, got {type(model).__name__}")
                if factory:
                    load_state(model, load_weights(path, digest, entry=entry), path)
                yield model  # copied by the ensemble before the next file is read into it

        ensemble = cls(models(), layer, features=features, reuse=reuse, snapshots_on=snapshots_on).to(device)
        ensemble.hashes = hashes
        return ensemble

    def __len__(self) -> int:
        return self._count

    @property
    def feature_dim(self) -> int:
        """D, the width of the features."""
        return self._captures[0].dim

    @torch.no_grad()
    def forward(self, *inputs, **named) -> tuple[Tensor, Tensor | None]:
        """All snapshots' logits (M, B, C) and last features (M, B, D), in the dtypes that snapshot 0 returns.

        All arguments are passed to the models. With `reuse` both results are views of memory that the next call
        overwrites, and which grows with the largest batch. ValueError if a snapshot differs in C or D.
        """
        if self._sharded:
            if len(inputs) != 1 or named or not isinstance(inputs[0], Tensor):
                raise ValueError("inputs must be one tensor where snapshots_on is ranks, got several or none")
            logits, features = self._own(self._sharded.all_images(*inputs))
            back = functools.partial(self._sharded.back, count=self._count)
            return back(logits), None if features is None else back(features)
        return self._own(*inputs, **named)

    def _own(self, *inputs, **named) -> tuple[Tensor, Tensor | None]:
        """What the models in this process say."""
        device = next((x.device for x in (*inputs, *named.values()) if isinstance(x, Tensor)), torch.device("cpu"))
        if self._offloaded and device.type != "cpu":
            each = self._offloaded(device, *inputs, **named)
        else:  # a GPU runs one model after another: nothing faster was measured yet
            each = self._folded(self._captures, *inputs, **named)
            each = each or (capture(*inputs, **named) for capture in self._captures)
        memory: list[Tensor | None] = [None, None]
        views = []
        for m, outputs in enumerate(each):
            if m == 0:
                memory = [*map(self._room, self._memory if self._reuse else memory, outputs)]
                views = [None if y is None else x[:, : len(y)] for x, y in zip(memory, outputs, strict=True)]
            for name, rows, view in zip(("logits", "features"), outputs, views, strict=True):
                if rows is None:
                    continue
                if rows.shape != view.shape[1:]:  # copy_ would broadcast
                    raise ValueError(
                        f"{name} of snapshot {m} must have snapshot 0's shape "
                        f"{tuple(view.shape[1:])}, got {tuple(rows.shape)}"
                    )
                view[m].copy_(rows)
        self._memory = memory if self._reuse else self._memory
        return views[0], views[1]  # pyright: ignore[reportReturnType]  # there are logits

    def train(self, mode: bool = True) -> "SnapshotEnsemble":
        """Stays in eval mode for any `mode`."""
        return super().train(False)

    def _room(self, memory: Tensor | None, rows: Tensor | None) -> Tensor | None:
        """`memory` where M times `rows` (B, width) fit into it, else new memory."""
        if rows is None:
            return None
        if rows.ndim != 2:
            raise ValueError(f"outputs of a snapshot must be (B, width), got shape {tuple(rows.shape)}")
        kind = rows.shape[1], rows.dtype, rows.device
        fits = memory is not None and (memory.shape[2], memory.dtype, memory.device) == kind
        if not fits or memory.shape[1] < len(rows):
            with torch.inference_mode(False):  # born in inference mode, it could never serve training
                memory = torch.empty(len(self.models), *rows.shape, dtype=rows.dtype, device=rows.device)
        return memory

    def _apply(self, fn, recurse=True):
        for model in self.models:
            model._apply(fn, recurse)
            if self._offloaded:
                pinned(model)
        return super()._apply(fn, recurse)
