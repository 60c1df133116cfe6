"""The page of a run over several seeds: means and intervals, a dot for each seed, links to the pages of the seeds."""

from pathlib import Path

from eekd.report.charts import Chart, Html, limits, missing, page, table, tag
from eekd.report.run import colour_of
from eekd.statistics import percent, points
from eekd.train.checked import title_of
from eekd.train.config import Config
from eekd.train.seeds import sentence


def draw(folder: Path, config: Config, summary: dict, seeds: dict[int, dict]) -> bytes:
    """The page of `summary`, RUN/summary.json; `seeds` are the summaries of its seeds, whose pages lie in seed-N/."""
    rows, findings = summary["rows"], summary.get("findings", [])
    cells = [[title_of(row["name"]), row["model"], f"{row['parameters']:,}", percent(row["val"]),
              percent(row["test"]), points(row["over_ce"]), points(row["over_last"])]
             for row in rows]  # fmt: skip
    head = ["", "network", "parameters", "val, %", "test, %", "over CE, points", "over KD (last), points"]
    breaks = {i for i in range(1, len(rows)) if rows[i]["kind"] != rows[i - 1]["kind"]}
    links = [tag("a", f"seed {seed}", href=f"seed-{seed}/report.html") for seed in seeds]
    between = [child for link in links for child in (link, " ")]
    return page(
        f"{config.data_name}, {len(seeds)} seeds · eekd",
        tag("header", tag("h1", config.data_name), tag("p", sentence(summary)), *map(missing, findings)),
        tag(
            "section",
            tag("h2", "Results"),
            table(head, cells, numbers=range(2, 7), breaks=breaks),
            tag(
                "p",
                "Mean ± standard deviation over seeds. Gains are taken seed by seed; in brackets is Student's "
                "95 % interval of their mean.",
                class_="quiet",
            ),
            students(rows, seeds),
        ),
        tag("section", tag("h2", "Each seed"), tag("p", *between)),
    )


def students(rows: list[dict], seeds: dict[int, dict]) -> Html:
    """Each student's test accuracy, a dot per seed; a line joins the students of one seed."""
    names = [row["name"] for row in rows if row["kind"] == "student"]
    if not names:
        return tag("p", "No student: this run trains teachers only.", class_="missing")
    accuracies = [{row["name"]: 100 * row["test_accuracy"] for row in summary["rows"]} for summary in seeds.values()]
    chart = Chart(
        "Students, seed by seed",
        "",
        "test accuracy, %",
        (-0.5, max(len(names) - 0.5, 0.5)),
        limits([one[name] for one in accuracies for name in names]),
        width=640,
        whole=True,
    )
    chart.parts = [part for part in chart.parts if "middle of" not in part]  # places of names, not numbers
    for place, name in enumerate(names):
        chart.add("text", title_of(name), x=chart.x(place), y=chart.bottom + 17, class_="middle of")
    for one in accuracies:
        line = "L".join(f"{chart.x(place):.5g},{chart.y(one[name]):.5g}" for place, name in enumerate(names))
        chart.add("path", d=f"M{line}", class_="rule", fill="none")
        for place, name in enumerate(names):
            chart.add(
                "circle",
                cx=chart.x(place),
                cy=chart.y(one[name]),
                r=4,
                class_="fill",
                style=f"color: {colour_of(name)}",
            )
    return chart.figure()
