"""The tables and plots of the documentation, a file for each page; here is what they share.

TABLES are the tables of a page, each by a field that only its records have.
"""

import shlex
from collections.abc import Iterable
from statistics import mean, stdev


def spread(values: list[float], scale: float = 1.0, sign: str = "") -> str:
    """mean ± std"""
    values = [v * scale for v in values]
    return f"{mean(values):{sign}.2f} ± {stdev(values):.2f}"


def provenance(record: dict, commits: Iterable[str] = ()) -> str:
    """The command, device, versions and commits that a record was made with."""
    env = record["environment"]
    commit = ", ".join(dict.fromkeys(c[:9] + c[40:] for c in commits or [env["commit"] or "unknown"]))
    if "driver" in record:
        device = f"{record['device']}, driver {record['driver']}, triton {env['triton']}"
    else:
        device = f"{env['cpu']}, {env['threads']} threads"
    return f"`{shlex.join(record['command'])}` on {device}, torch {env['torch']}, commit {commit}."


def head(*columns: str) -> list[str]:
    """The first two lines of a table whose columns are numbers, apart from the first."""
    return [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def pyplot(fonttype: str = "none"):
    """matplotlib's, writing the same SVG for the same numbers, its text as text or, by "path", as shapes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "eekd", "svg.fonttype": fonttype, "font.size": 9}
    import matplotlib.pyplot

    return matplotlib.pyplot
