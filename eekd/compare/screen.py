"""What `eekd compare` shows: what it would take, and at the end every method and which to take. Needs rich."""

from rich import box
from rich.console import Console
from rich.table import Table

from eekd.compare.plots import points
from eekd.compare.variants import titled
from eekd.io.files import printable
from eekd.statistics import fewer, percent


def ending(console: Console, record: dict) -> None:
    """A row for each method, then the advice."""
    table = _table("method", "validation, %", "over ce, points", "over last, points")
    for row in record["methods"]:
        over = points(row["val_over_ce"]), points(row["val_over_last"])
        name, at, _ = row["name"].partition("@")
        settings = "\n" + titled(row["settings"]).removeprefix(", ") if at else ""
        few = fewer(row["n"], len(record["seeds"]))
        table.add_row(printable(name) + few + printable(settings), percent(row["val"]), *over)
    for column in table.columns[1:]:  # a narrow screen folds names, not numbers
        column.min_width = max(map(len, map(str, column.cells)), default=0)
    table.caption = "over: on validation images, seed by seed, with Student's 95 % interval"
    if record["methods"]:
        console.print(table)
    say(console, record["advice"]["text"])


def planned(console: Console, rows: list[dict], sentence: str) -> None:
    """A row for each part of what `eekd.compare.plan.plan` returns, then a sentence."""
    table = _table("part", "to make", "finished", "each", "all")
    for row in rows:
        each = row["seconds"] / row["number"] if row["number"] else 0
        times = (duration(each), duration(row["seconds"])) if row["number"] else ("", "")
        table.add_row(printable(row["part"]), str(row["number"]), str(row["finished"]), *times)
    console.print(table)
    say(console, sentence)


def say(console: Console, line: str) -> None:
    """Prints a line as it is, wrapped by the terminal alone; nothing where it is empty."""
    if line:
        console.print(printable(line), highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in the two units that tell most."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    return table
