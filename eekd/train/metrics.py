"""What is measured while a network trains: means, seconds, accuracy, and the files that hold them."""

import csv
import dataclasses
import io
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd import parallel
from eekd.data import Loader
from eekd.io.files import write_atomic
from eekd.snapshots.wrappers import logits_of
from eekd.train.callbacks import Callback
from eekd.train.logs import Log, Safely
from eekd.train.run_folder import METRICS, finite
from eekd.train.session import Session


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of (B, C) logits that are highest at the label, of mixed labels (B, C) at that of the larger share."""
    labels = labels if labels.ndim == 1 else labels.argmax(1)
    return (logits.argmax(1) == labels).double().mean()


@torch.no_grad()
def evaluate(session: Session, network: nn.Module, loader: Loader) -> dict[str, float]:
    """Mean cross-entropy and accuracy on all images of all processes' loaders."""
    network.eval()
    means = RunningMeans()
    for images, labels, _ in loader:
        logits = logits_of(session.run(network, images)).float()
        means.add(len(labels), loss=F.cross_entropy(logits, labels), accuracy=accuracy(logits, labels))
    return means.all()


class RunningMeans:
    """Means over samples of named measurements, summed on the device and read when asked.

    `means[name]` is of this process, `means.all()` of all processes, which must ask together.
    """

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, rows: int, **means: Tensor) -> None:
        """Adds the means over `rows` samples; ValueError where one has another shape than before."""
        self.count += rows
        for name, mean in means.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(mean, dtype=torch.float64)
            if mean.shape != self.sums[name].shape:
                wanted = tuple(self.sums[name].shape)
                raise ValueError(f"measurement {name} must have shape {wanted} all epoch, got {tuple(mean.shape)}")
            if rows:
                self.sums[name].add_(mean.detach(), alpha=rows)

    def __getitem__(self, name: str) -> float | list[float]:
        return (self.sums[name] / self.count).tolist()

    def all(self) -> dict:
        if not self.sums:
            return {}
        sums, every = [*self.sums.values()], RunningMeans()
        count = torch.tensor([self.count], dtype=torch.float64, device=sums[0].device)
        count, *parts = parallel.all_reduce_sum(torch.cat([count, *(x.flatten() for x in sums)])).split(
            [1, *(x.numel() for x in sums)]
        )
        every.count = count.item()
        every.sums = {name: x.view_as(own) for (name, own), x in zip(self.sums.items(), parts, strict=True)}
        return {name: every[name] for name in every.sums}


class Calibration:
    """Accuracy, likelihood and expected calibration error of several predictors of the same images.

        ece = sum_bins count/N |accuracy - confidence|,    15 equal bins of the confidence

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """

    BINS = 15

    def __init__(self, predictors: int, device: torch.device):
        self.likelihood = torch.zeros(predictors, dtype=torch.float64, device=device)
        # Sums of confidence, hits, ones.
        self.bins = torch.zeros(3, predictors, self.BINS, dtype=torch.float64, device=device)

    def add(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        """Counts a batch, fp64 (predictors, B, C); returns the predicted classes (predictors, B)."""
        rows = torch.arange(len(labels), device=labels.device)
        self.likelihood += log_probabilities[:, rows, labels].sum(1)
        confidence, predicted = log_probabilities.exp().max(-1)
        place = F.one_hot((confidence * self.BINS).long().clamp_(max=self.BINS - 1), self.BINS).double()
        values = torch.stack([confidence, (predicted == labels).double(), torch.ones_like(confidence)])
        self.bins += torch.einsum("kmb,mbn->kmn", values, place)
        return predicted

    def reduce(self) -> None:
        """Adds up what all processes counted, which call together."""
        self.likelihood, self.bins = map(parallel.all_reduce_sum, (self.likelihood, self.bins))

    def all(self) -> list[dict]:
        """Of each predictor accuracy, nll, ece and reliability: confidence, accuracy and count of each bin."""
        results = []
        for likelihood, (confidence, hits, count) in zip(self.likelihood, self.bins.unbind(1), strict=True):
            sums = {"accuracy": hits.sum(), "nll": -likelihood, "ece": (hits - confidence).abs().sum()}
            bins = {"confidence": _means(confidence, count), "accuracy": _means(hits, count)}
            means = {name: (x / count.sum()).item() for name, x in sums.items()}  # NaN where there are no images
            results.append(means | {"reliability": bins | {"count": count.long().tolist()}})
        return results


def _means(sums: Tensor, count: Tensor) -> list[float | None]:
    return [x / n if n else None for x, n in zip(sums.tolist(), count.tolist(), strict=True)]


class PhaseTimer:
    """Seconds spent in named stretches of code: by CUDA events, read at the end, or by the clock of a CPU.

    Where one stretch is within another, its time counts for the inner one only.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans, self._open = defaultdict(list), []  # names of the stretches that have begun, and since when
        self.before: dict[str, float] = {}  # seconds before a kill

    @contextmanager
    def __call__(self, name: str):
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        """Ends the span that is open, if any, and begins the next."""
        now = self._now()
        if self._open:
            self.spans[self._open[-1]].append((self._since, now))
        self._since = now

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        spans = (a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.spans[name])
        return sum(spans, self.before.get(name, 0.0))

    def all(self) -> dict[str, float]:
        return {name: self.seconds(name) for name in [*self.spans.keys() | self.before.keys()]}


class MetricsLogger(Callback):
    """Writes a row per epoch to metrics.jsonl, metrics.csv and `logs` (eekd.train.logs); the first process does.

    With `resume` it goes on after the trainer's rows, whatever the files hold. FileExistsError without, where there
    are files.
    """

    def __init__(self, folder: Path, logs: Sequence[type[Log]] = (), resume: bool = False):
        self.folder, self.kinds, self.resume = folder, logs, resume
        self.rows, self.logs = [], []

    @contextmanager
    def running(self, trainer):
        self.open(trainer.rows)
        failed = True
        try:
            if parallel.is_main_process():
                arguments = dataclasses.asdict(trainer.config), len(self.rows)
                self.logs = [Safely(kind, self.folder, *arguments) for kind in self.kinds]
            yield
            failed = False
        finally:
            for log in self.logs:
                log.close(failed)

    def on_epoch_end(self, trainer, row):
        self.write(row)

    def open(self, rows: Sequence[dict] = ()) -> None:
        """Makes the files hold these rows."""
        if not self.resume and (self.folder / METRICS[0]).exists():
            raise FileExistsError(f"{self.folder} already holds a trained network; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = [*rows]
        if not parallel.is_main_process():
            return
        self._write_anew()

    def write(self, row: dict) -> None:
        """Appends a row."""
        row, before = finite(row), _columns(self.rows)
        self.rows.append(row)
        if not parallel.is_main_process():
            return
        if before and _columns(self.rows) != before:
            self._write_anew()
        else:
            for name, text in zip(METRICS, _text([row], before or _columns([row]), header=not before), strict=True):
                try:
                    with open(self.folder / name, "a", newline="") as file:
                        file.write(text)
                except OSError as error:
                    error.filename = str(self.folder / name)  # a full disk does not say where
                    raise
        for log in self.logs:
            log.write({name: value for name, value in _flat(row).items() if value is not None})

    def _write_anew(self) -> None:
        for name, text in zip(METRICS, _text(self.rows, _columns(self.rows)), strict=True):
            if text:
                write_atomic(self.folder / name, text.encode())
            else:
                (self.folder / name).unlink(missing_ok=True)


def _columns(rows: list[dict]) -> list[str]:
    """The columns of metrics.csv, in the order in which they come up."""
    return [*dict.fromkeys(name for row in rows for name in _flat(row))]


def _text(rows: list[dict], columns: list[str], header: bool = True) -> tuple[str, str]:
    """The text of these rows in metrics.jsonl and metrics.csv."""
    text = io.StringIO(newline="")
    if rows:
        table = csv.DictWriter(text, columns)
        if header:
            table.writeheader()
        table.writerows(map(_flat, rows))
    return "".join(json.dumps(row) + "\n" for row in rows), text.getvalue()


def _flat(row: dict) -> dict:
    """A row with a list spread over several entries."""
    flat = {}
    for name, value in row.items():
        several = value if isinstance(value, list) else None
        flat |= {f"{name}_{i}": v for i, v in enumerate(several, 1)} if several else {name: value}
    return flat
