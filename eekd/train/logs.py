"""Where the rows of metrics.jsonl go besides files: TensorBoard, Weights & Biases, MLflow.

Each is an extra of eekd, asked for by a setting of its name. A service that fails ends with a warning: the run goes on,
and its files have everything.
"""

import importlib
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eekd.io.files import first_line, read_json, write_json_atomic

TRACKERS = "trackers.json"  # in the folder of a phase: the names by which services know it


class Log:
    """Takes the rows of a phase. A subclass says what the package is called and what happens to a row.

    It is made with the folder of the phase, all settings of the run, and how many rows there are from before a kill.
    """

    name: str
    package: str

    def __init__(self, folder: Path, settings: Mapping, rows: int):
        raise NotImplementedError

    @classmethod
    def load(cls):
        """The package; ImportError, one sentence, where it is missing."""
        try:
            return importlib.import_module(cls.package)
        except ImportError:
            raise ImportError(f"{cls.name} is not installed; pip install 'eekd[{cls.name}]'") from None

    def write(self, row: Mapping[str, float]) -> None:
        """Takes the numbers of a row, among them `epoch`."""
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        """Ends the phase, with or without success."""


class TensorBoard(Log):
    """Events in the folder of the phase."""

    name, package = "tensorboard", "torch.utils.tensorboard"

    def __init__(self, folder, settings, rows):
        self.events = self.load().SummaryWriter(folder, purge_step=rows + 1)

    def write(self, row):
        for name, value in row.items():
            self.events.add_scalar(name, value, row["epoch"])
        self.events.flush()

    def close(self, failed):
        self.events.close()


class WandB(Log):
    """A run of Weights & Biases for each phase, grouped by run; WANDB_PROJECT and WANDB_MODE are read."""

    name, package = "wandb", "wandb"

    def __init__(self, folder, settings, rows):
        run, phase = _titles(folder)
        self.run = self.load().init(
            project=os.environ.get("WANDB_PROJECT", "eekd"),
            group=run,
            name=f"{run}/{phase}",
            id=_known(folder, self.name, lambda: uuid.uuid4().hex),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            settings={"console": "off", "silent": True},  # the terminal is eekd's
        )

    def write(self, row):
        self.run.log(dict(row), step=row["epoch"])  # one that it has already is left out

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


class MLflow(Log):
    """A run of MLflow for each phase; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are read."""

    name, package = "mlflow", "mlflow"

    def __init__(self, folder, settings, rows):
        self.client = self.load().MlflowClient()
        self.run = _known(folder, self.name, lambda: self._begin(folder, settings))

    def _begin(self, folder: Path, settings: Mapping) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "eekd")
        experiment = self.client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self.client.create_experiment(name)
        run = self.client.create_run(place, run_name="/".join(_titles(folder))).info.run_id
        for key, value in _flat(settings):
            self.client.log_param(run, key, value)
        return run

    def write(self, row):
        for name, value in row.items():
            self.client.log_metric(self.run, name, value, step=row["epoch"])

    def close(self, failed):
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


LOGS: tuple[type[Log], ...] = (TensorBoard, WandB, MLflow)


def asked_for(config) -> list[type[Log]]:
    """The logs that the settings ask for; ImportError, one sentence, where a package is missing."""
    logs = [log for log in LOGS if getattr(config, log.name)]
    for log in logs:
        log.load()
    return logs


class Safely:
    """A log whose failure is a warning, after which it is left alone."""

    def __init__(self, kind: type[Log], *args):
        self.kind = kind
        self.log: Any = None
        self._try(lambda: setattr(self, "log", kind(*args)))

    def write(self, row: Mapping[str, float]) -> None:
        """`Log.write`."""
        if self.log:
            self._try(lambda: self.log.write(row))

    def close(self, failed: bool) -> None:
        """`Log.close`."""
        if self.log:
            self._try(lambda: self.log.close(failed))

    def _try(self, call) -> None:
        try:
            call()
        except Exception as error:  # whatever a service, or the way to it, may raise
            self.log = None
            warnings.warn(
                f"{self.kind.name} failed and gets no more rows of this phase, whose metrics.jsonl has them all: "
                f"{type(error).__name__}: {first_line(error)}",
                RuntimeWarning,
                stacklevel=4,
            )


def _titles(folder: Path) -> tuple[str, str]:
    """What services call the run and the phase in a folder RUN/teacher or RUN/students/NAME."""
    folder = folder.absolute()
    run = folder.parent.parent if folder.parent.name == "students" else folder.parent
    return run.name, folder.name


def _known(folder: Path, name: str, make) -> str:
    """The name by which a service knows this phase, kept in its folder, so that a resumed run goes on in its place."""
    path = folder / TRACKERS
    names = read_json(path) if path.exists() else {}
    if name not in names:
        names[name] = make()
        write_json_atomic(path, names)
    return names[name]


def _flat(settings: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
