"""What the phases of a run share: settings, data, device, precision, and how processes share the work."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eekd import parallel
from eekd.bank import LogitBank
from eekd.data import ImageData, Loader, load
from eekd.data.loader import SHOWN
from eekd.io.files import read_json
from eekd.kept_code import check_code
from eekd.snapshots import SnapshotEnsemble
from eekd.train.config import Config, Phase
from eekd.train.pretrained import Start, interpolation_of, normalization, read_start
from eekd.train.random_state import seed_generators
from eekd.train.runtime import Runtime, chosen

SPLIT = ("train_limit", "val_fraction", "split_seed")  # settings that decide which images there are

Progress = Callable[[str, int, int, dict], object]  # phase, steps done, steps in all, the metrics so far


def lines(phase: str, done: int, total: int, metrics: dict) -> None:
    """Prints a line after every epoch."""
    if "val_accuracy" in metrics and parallel.is_main_process():
        epoch, loss = f"{metrics['epoch']}/{metrics['epochs']}", metrics["train_loss"]
        print(f"{phase}: epoch {epoch}, loss {loss:.3f}, validation accuracy {metrics['val_accuracy']:.2%}", flush=True)


def quiet(phase: str, done: int, total: int, metrics: dict) -> None:
    """Shows no progress."""


# Of DistributedDataParallel: whether each forward brings the first process's buffers; torch 2.14 renames it.
_OWN_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class Session(Runtime):
    """What the phases of a run share: settings, data, logit bank (or None), device and precision.

    Of several processes (eekd.parallel.process_group) each has its share of every batch; batch_size is that of a
    step, over all of them and all micro-batches. `config` are the settings with "auto" decided, `asked` those that
    were given. Sets torch's process-wide switches of determinism.
    """

    def __init__(self, config: Config, data: ImageData | None = None):
        device = _device(config.device)
        config = dataclasses.replace(config, interpolation=interpolation_of(config))
        self.asked, self.config = config, (config := chosen(config, device))
        super().__init__(config.precision, config.channels_last is True, device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        self.data = data or load(config.data, config.root, **config.reading())
        self.bank = LogitBank.open(config.bank) if config.bank else None
        self.notes: list[str] = []  # what `prepare` decided about the networks
        self._starts: dict[tuple, Start | None] = {}

    def spec(self, phase: Phase) -> dict:
        """The arguments of eekd.models.build for this data."""
        data, args = self.data, phase.arguments()
        spec = dict(
            name=phase.model, num_classes=len(data.classes), in_channels=data.channels, image_size=data.image_size
        )
        own, _ = self.normalization(phase)
        more = {"args": args, "normalization": own, "output": phase.output}
        return spec | {name: value for name, value in more.items() if value}

    def normalization(self, phase: Phase) -> tuple[dict | None, str | None]:
        """The normalization of the network's spec, None where it is the data's; and a sentence that says so."""
        return normalization(phase, {"mean": list(self.data.mean), "std": list(self.data.std)})

    def start(self, phase: Phase) -> Start | None:
        """The weights that the network of a phase starts from; None for random ones."""
        key = phase.model, phase.weights, phase.model_args
        if key not in self._starts:
            self._starts[key] = read_start(phase, self.spec(phase), self.config.checkpoint_entry)
        return self._starts[key]

    def network(self, phase: Phase, seed: int) -> nn.Module:
        """A new network on the device; its weights, and all random numbers drawn after, are a function of the seed.

        The random numbers drawn after differ between processes.
        """
        seed_generators(seed)
        network = self.build(self.spec(phase))
        if start := self.start(phase):
            start.load(network, len(self.data.classes))
        if phase.grad_checkpointing:
            checkpoint_gradients(network, phase)
        if not parallel.is_main_process():
            seed_generators(int(np.random.SeedSequence((seed, parallel.rank())).generate_state(1)[0]))
        return parallel.convert_sync_batchnorm(network) if self.config.sync_batchnorm else network

    def parallelize(self, network: nn.Module, kind: str | None = None) -> nn.Module:
        """The network as all processes train it together, by config.parallel: replicas with one gradient, or shards."""
        if parallel.world_size() == 1 or not any(p.requires_grad for p in network.parameters()):
            return network
        if (kind or self.config.parallel) == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(network, mesh=init_device_mesh(self.device.type, (parallel.world_size(),)))
            return network  # changed in place
        # To look for unused parameters keeps the buckets of gradients as they are: else they, and with three processes
        # the order of a sum, change after the first step, so that a resumed run would have other bits.
        return DistributedDataParallel(
            network,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.config.deterministic,
            **{_OWN_BUFFERS: False},  # pyright: ignore[reportArgumentType]  # its name depends on torch's version
        )

    def micro_batch(self, phase: Phase) -> int:
        """How many samples of a step a process sees at once; ValueError where they cannot be shared out evenly."""
        parts = parallel.world_size() * self.config.accumulate
        if phase.batch_size % parts:
            raise ValueError(
                f"{phase._prefix}batch_size must be a multiple of {parts} ({parallel.world_size()} "
                f"processes x accumulate {self.config.accumulate}), got {phase.batch_size}"
            )
        return phase.batch_size // parts

    def loader(self, split: str, phase: Phase, train: bool = False) -> Loader:
        """Batches of a split; to train on: shuffled, augmented and never a process's last one of one (batch norm).

        With a bank, epoch after epoch shows one of its views.
        """
        images = getattr(self.data, split)
        views = dict(views=self.bank.views, view_seed=self.bank.seed) if train and self.bank else {}
        augment = self.data.augment if self.config.augment == "auto" else self.config.augment
        each, processes = self.micro_batch(phase), parallel.world_size()
        repeats = phase.repeats if train and not views else 1
        if each % repeats:
            raise ValueError(f"{phase._prefix}repeats must divide the {each} images of a process, got {repeats}")
        rest = len(images) // repeats % (each // repeats * processes)
        return Loader(
            images,
            batch_size=each,
            augment=augment if train else "none",
            seed=self.config.seed,
            device=self.device,
            train=train,
            workers=self.config.workers,
            drop_last=train and 0 < rest < 2 * processes,
            rank=parallel.rank(),
            world_size=processes,
            classes=len(self.data.classes),
            repeats=repeats,
            **{name: getattr(phase, name) for name in (*SHOWN, "label_smoothing")},
            **views,
        )

    def load_snapshots(
        self, folder: str | Path, which: Sequence[int] | None = None, features: bool = True
    ) -> SnapshotEnsemble:
        """The snapshots in `folder`, or those of the indices `which`, where and as this run runs them.

        A call's outputs are overwritten by the next. Raises what `check_code` and SnapshotEnsemble.load do.
        """
        record = Path(folder, "snapshots.json")
        if record.exists():
            check_code(Path(folder), read_json(record))
        options = {"layer": self.config.teacher.layer, "snapshots_on": self.config.snapshots_on}
        ensemble = SnapshotEnsemble.load(
            folder, device=self.device, which=which, features=features, reuse=True, **options
        )
        return ensemble.to(memory_format=self.layout)

    def compiled(self, network: nn.Module) -> nn.Module:
        return torch.compile(network) if self.config.compile else network  # pyright: ignore[reportReturnType]


def checkpoint_gradients(network: nn.Module, phase: Phase) -> None:
    """Lets the network compute activations again in its backward; ValueError where it cannot."""
    setting = f"{phase._prefix}grad_checkpointing"
    try:
        network.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]  # timm's
    except (AssertionError, AttributeError):
        raise ValueError(f"{setting} must be false for {phase.model}, which cannot do it, got true") from None
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise ValueError(
            f"{setting} must be false for {phase.model}, whose batch norms would count each batch twice, got true"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device must be {'cpu or cuda' if torch.cuda.is_available() else 'cpu'} on this machine, got {name!r}"
        ) from None
    device = torch.device(name)
    if device.type == "cuda" and not parallel.enough_gpus():
        raise ValueError(
            f"device {name} must have a GPU for each process of this machine, got {torch.cuda.device_count()}: "
            "start fewer processes, or give --device cpu"
        )
    return device
