"""What `eekd train` shows while it runs and at its end: bars, and tables that keep numbers whole. Needs rich."""

import math
from typing import TYPE_CHECKING

from rich import box, progress
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from eekd.io.files import printable
from eekd.statistics import percent, points
from eekd.train.checked import title_of
from eekd.train.config import Config
from eekd.user_code import own_name

if TYPE_CHECKING:  # torch, and what needs it, comes after the command line is read: --help is quick then
    from eekd.train import Session


class Display:
    """Progress of the phases: live bars on a terminal; elsewhere a line per epoch, of several seeds per phase."""

    def __init__(self, console: Console, seeds: int = 1):
        self.console, self.seeds = console, seeds
        text = progress.TextColumn
        self.bars = progress.Progress(
            text("{task.description}"),
            progress.BarColumn(),
            text("{task.fields[state]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, progress.TaskID] = {}

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *error):
        self.bars.stop()

    def __call__(self, name: str, done: int, total: int, metrics: dict) -> None:
        phase, comma, seed = name.partition(", ")
        title = title_of(phase) + comma + seed
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(title, total=total, state="")
        state = f"epoch {metrics['epoch']}/{metrics['epochs']}  loss {metrics['train_loss']:.3f}"
        if "val_accuracy" in metrics:
            state += f"  val {metrics['val_accuracy']:.2%}"
            if not self.console.is_terminal and (self.seeds == 1 or metrics["epoch"] == metrics["epochs"]):
                self.console.print(f"{title}: {state}", highlight=False)
        self.bars.update(self.tasks[name], completed=done, state=state)


def check_data(console: Console, config: Config) -> int:
    """Reads every image once and lists what is wrong; returns 0, or 2 where something is."""
    from eekd.data import check_images

    with progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images read")
        checked = check_images(
            config.data,
            config.root,
            **config.source(),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for sentence in (*checked.notes, *checked.faults):
        console.print(f"- {printable(sentence)}", highlight=False, soft_wrap=True)
    faults = f"{len(checked.faults):,} things are" if len(checked.faults) != 1 else "1 thing is"
    verdict = f"{faults} wrong, listed last" if checked.faults else "nothing is wrong"
    console.print(f"{checked.images:,} images of {printable(config.data)} were read: {verdict}.", highlight=False)
    return 2 if checked.faults else 0


def plan(session: "Session") -> Table:
    """What a run would do, phase by phase."""
    from eekd import parallel
    from eekd.train.estimate import plan as phases

    data, rows, processes = session.data, phases(session), parallel.world_size()
    table = _table(
        ("phase", "network", "parameters", "epochs", "steps", "memory", "disk"),
        f"{data.name}, {data.channels} x {data.image_size} x {data.image_size}: {len(data.train):,} images "
        f"to train on, {len(data.val):,} to validate, {len(data.test):,} to test"
        + f"; memory of each of {processes} processes" * (processes > 1)
        + f"; computed in {_chosen(session)}"
        + f"; all of it {session.config.seeds} times, with another seed each" * (session.config.seeds > 1),
    )
    for row in rows:
        numbers = f"{row['parameters']:,}", str(row["epochs"]), f"{row['steps']:,}"
        sizes = _size(row["memory"]), _size(row["disk"])
        table.add_row(_name(title_of(row["name"])), _name(row["model"]), *numbers, *sizes)
    return table


def takes(session: "Session") -> str:
    """A sentence with the time that a run takes, and each of its phases."""
    from eekd.train.estimate import seconds

    seeds, device = session.config.seeds, {"cpu": "CPU", "cuda": "GPU"}.get(session.device.type, "device")
    each = {title_of(own_name(name)): seeds * took for name, took in seconds(session).items()}
    parts = ", ".join(f"{name} {_duration(took)}" for name, took in each.items())
    return f"It takes about {_duration(sum(each.values()))} on this {device}, without validation: {parts}."


def kept(config: Config) -> list[str]:
    """A sentence for each of teacher and students of which an average of the weights is kept."""
    sentence = "The {} that are validated, saved and exported are averages of the weights (ema {:g})."
    phases = (("snapshots", config.teacher), ("students", config.student))
    return [sentence.format(who, phase.ema) for who, phase in phases if phase.ema]


def _chosen(session: "Session") -> str:
    """Precision and memory format, "(auto)" behind what the device decided."""
    asked, config = session.asked, session.config
    words = config.precision, "channels_last" if config.channels_last else "contiguous memory"
    auto = asked.precision == "auto", asked.channels_last == "auto"
    return " and ".join(word + " (auto)" * by for word, by in zip(words, auto, strict=True))


def results(rows: list[dict]) -> Table:
    """The rows of a run's summary.json."""
    columns = "", "network", "parameters", "epoch", "val %", "test %", "gain", "s/epoch"
    table = _table(columns, "gain over CE in points of test accuracy")
    for row in rows:
        gain, seconds = row["gain"], row["seconds_per_epoch"]
        table.add_row(
            _name(title_of(row["name"])),
            _name(row["model"]),
            f"{row['parameters']:,}",
            printable(row["epochs"]),
            f"{100 * row['val_accuracy']:.2f}",
            f"{100 * row['test_accuracy']:.2f}",
            "" if gain is None or row["name"] == "ce" else f"{100 * gain:+.2f}",
            "" if seconds is None else f"{seconds:.2f}",
            end_section=row["kind"] in ("teacher", "ensemble"),
        )
    return table


def over_seeds(summary: dict) -> Table:
    """The summary of a run over several seeds."""
    table = _table(
        ("", "network", "test %", "over CE", "over KD (last)"),
        f"mean ± std over {len(summary['seeds'])} seeds; gains in points, seed by seed, with 95 % intervals",
    )
    for row in summary["rows"]:
        cells = percent(row["test"]), points(row["over_ce"]), points(row["over_last"])
        ends = row["kind"] in ("teacher", "ensemble")
        table.add_row(_name(title_of(row["name"])), _name(row["model"]), *cells, end_section=ends)
    return table


def _table(columns: tuple[str, ...], caption: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=printable(caption), caption_justify="left")
    for i, column in enumerate(columns):
        # Where there is too little room, only columns that may wrap are narrowed: the names, which are cut instead.
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i >= 2)
    return table


def show(console: Console, table: Table) -> None:
    """Prints a table; where there is too little room networks are cut first, then names, and numbers never."""

    def excess() -> int:
        wide = console.options.update(max_width=10_000)
        return max(0, Measurement.get(console, wide, table).maximum - console.width)

    if excess():
        table.padding = 0
        network = table.columns[1]
        network.max_width = max(8, max(len(str(cell)) for cell in network.cells) - excess())
    console.print(table)


def _name(text: str) -> Text:
    return Text(printable(text), no_wrap=True, overflow="ellipsis")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
