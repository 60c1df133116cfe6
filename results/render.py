"""Writes the tables of README.md and docs/, and the plots, from the JSON files beside this script.

python results/render.py          # rewrites what stands between <!-- table:NAME --> and <!-- end -->
python results/render.py --check  # changes nothing; exits 1 where a table is not what the JSON says
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
TITLES = {"ce": "student, CE only", "last": "student, KD from the last snapshot", "attention": "student, EEKD"}


def spread(values: list[float], scale: float = 1.0, sign: str = "") -> str:
    """mean ± std"""
    values = [v * scale for v in values]
    return f"{mean(values):{sign}.2f} ± {stdev(values):.2f}"


def provenance(record: dict) -> str:
    env = record["environment"]
    return (
        f"`{' '.join(record['command'])}` on {env['cpu']}, {env['threads']} threads, torch {env['torch']}, "
        f"commit {env['commit'][:9]}."
    )


def seeds(record: dict) -> str:
    """Mean ± std of a preset's runs."""
    runs = record["runs"]
    lines = [
        "| | network | parameters | test accuracy, % | gain over CE, points | s per epoch |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        first = rows[0]
        name = TITLES.get(first["name"], first["name"])
        name += f", epoch {first['epochs']}" if first["kind"] == "snapshot" else ""
        gain = (
            spread([r["gain"] for r in rows], 100, "+") if first["gain"] is not None and first["name"] != "ce" else ""
        )
        seconds = "" if first["seconds_per_epoch"] is None else f"{mean(r['seconds_per_epoch'] for r in rows):.1f}"
        accuracy = spread([r["test_accuracy"] for r in rows], 100)
        lines.append(f"| {name} | {first['model']} | {first['parameters']:,} | {accuracy} | {gain} | {seconds} |")
    minutes = mean(run["seconds"] for run in runs) / 60
    lines += [
        "",
        f"Mean ± std over {len(runs)} seeds, last epoch, {minutes:.1f} minutes per seed: {provenance(record)}",
    ]
    return "\n".join(lines)


def bench(record: dict) -> str:
    """Times and ratios of the kernel bench."""
    lines = [
        "| (B, M, C) | fusion | eekd, µs | eager | torch.compile | × eager | × compile |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        times = {name: t["us"] for name, t in row["times"].items()}
        compiled = min(t for name, t in times.items() if name.startswith("compile"))
        shape = ", ".join(map(str, row["shape"]))
        lines.append(
            f"| ({shape}) | {row['fusion']} | {times['eekd']:,.0f} | {times['eager']:,.0f} | {compiled:,.0f} "
            f"| {row['vs_eager']:.1f} | {row['vs_compile']:.1f} |"
        )
    s = record["summary"]
    lines.append(
        f"| geometric mean | | | | | **{s['geomean_vs_eager']:.1f}** | **{s['geomean_vs_compile']:.1f}** |\n\n"
        f"Forward + backward, fp32, median: {provenance(record)}"
    )
    return "\n".join(lines)


def plot(record: dict, path: Path) -> None:
    """Test accuracy of every student and seed beside its teacher's snapshots."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "eekd", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=False, layout="constrained")
    runs = record["runs"]
    rows = runs[0]["rows"]
    snapshots = [i for i, row in enumerate(rows) if row["kind"] == "snapshot"]
    for run in runs:
        values = [100 * run["rows"][i]["test_accuracy"] for i in snapshots]
        left.plot([rows[i]["epochs"] for i in snapshots], values, "o-", color="#4477aa", alpha=0.7, ms=4)
    left.set(title="The teacher's snapshots", xlabel="epoch", ylabel="test accuracy, %")
    students = [i for i, row in enumerate(rows) if row["kind"] == "student"]
    for place, i in enumerate(students):
        values = [100 * run["rows"][i]["test_accuracy"] for run in runs]
        right.plot([place] * len(values), values, "o", color="#4477aa", alpha=0.7, ms=4)
        right.plot([place - 0.2, place + 0.2], [mean(values)] * 2, color="#cc3311")
    names = [
        {"ce": "CE only", "last": "KD, last", "attention": "EEKD"}.get(rows[i]["name"], rows[i]["name"])
        for i in students
    ]
    right.set_xticks(range(len(names)), names)
    right.set(title="Students: each seed, and the mean", xlim=(-0.5, len(names) - 0.5), ylabel="test accuracy, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str]) -> int:
    pages = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
    stale = []
    for page in pages:
        text = page.read_text()

        def fill(match: re.Match) -> str:
            record = json.loads((HERE / f"{match[1]}.json").read_text())
            return f"<!-- table:{match[1]} -->\n{(bench if 'rows' in record else seeds)(record)}\n<!-- end -->"

        fresh = re.sub(r"<!-- table:(\S+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)
        if fresh != text:
            stale.append(page)
            if "--check" not in argv:
                page.write_text(fresh)
    if "--check" in argv:
        print("\n".join(f"{page} is not what results/ says" for page in stale))
        return bool(stale)
    for path in HERE.glob("*.json"):
        record = json.loads(path.read_text())
        if "runs" in record:
            plot(record, path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
