"""The tables and plots of docs/results/kernels.md, and the table of docs/reference/ops.md."""

from pathlib import Path

from tables import head, provenance, pyplot, table_row

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ISAS = {"avx2": "AVX2", "avx512": "AVX-512"}


def bench(record: dict) -> str:
    """Times of the kernel bench; ratios and share of the copy bandwidth are the faster backend's."""
    rows, summary = record["rows"], record["summary"]
    ran = {name for row in rows for name in row["contenders"] if "us" in row["contenders"][name]}
    backends = [name for name in ("native", "triton") if name in ran]
    baselines = [b for b in ("eager", "compile", "liger") if any(row["best_us"].get(b) for row in rows)]
    copied = "copy" in ran
    several = [key for key in ("dtype", "layout") if len({row[key] for row in rows}) > 1]
    first = ["(B, M, C, K)" if len(rows[0]["shape"]) == 4 else "(B, M, C)", *several, "fusion"]
    columns = ["eekd, µs"] if len(backends) == 1 else [f"{name}, µs" for name in backends]
    columns += ["torch.compile" if b == "compile" else b for b in baselines]
    ratios = [f"vs_{b}" for b in baselines]
    tail = [f"× {b}" for b in baselines] + ["% of copy"] * copied + ["faster"] * (len(backends) > 1)
    lines = [f"| {' | '.join([*first, *columns, *tail])} |"]
    lines += [f"|{'---|' * len(first)}{'--:|' * (len(columns) + len(tail))}"]

    def line(*cells):
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")

    def number(x, spec):
        return "" if x is None else format(x, spec)

    for row in rows:
        best = row["contenders"].get(row["fastest"], {})
        us = [row["contenders"].get(name, {}).get("us") for name in backends]
        us += [row["best_us"].get(b) for b in baselines]
        cells = [number(x, ",.0f") for x in us] + [number(best.get(ratio), ".1f") for ratio in ratios]
        cells += [number(best.get("percent_of_copy"), ".0f")] * copied
        cells += [row["fastest"] or ""] * (len(backends) > 1)
        line(f"({', '.join(map(str, row['shape']))})", *(row[key] for key in several), row["fusion"], *cells)
    for name in backends:
        means = [number(summary[name].get(f"geomean_{ratio}"), ".1f") for ratio in ratios]
        of = f" of {name}" if len(backends) > 1 else ""
        faster = [f"{summary[name]['fastest']} of {len(rows)}"] * (len(backends) > 1)
        blank = [""] * (len(first) - 1 + len(columns))
        line(f"geometric mean{of}", *blank, *(f"**{x}**" for x in means), *[""] * copied, *faster)
    dtypes = ", ".join(dict.fromkeys(SHORT[row["dtype"]] for row in rows))
    return "\n".join(lines) + f"\n\nForward + backward, {dtypes}, median: {provenance(record)}"


def by_dtype(records: list[dict]) -> str:
    """Runs of the kernel bench of several dtypes, by instruction set: microseconds."""
    names = [ISAS[record["environment"]["cpu_capability"]] for record in records]
    dtypes = list(dict.fromkeys(row["dtype"] for row in records[0]["rows"]))
    lines = head("(B, M, C)", "fusion", *(f"{name}: {SHORT[dtype]}, µs" for name in names for dtype in dtypes))
    for i in range(0, len(records[0]["rows"]), len(dtypes)):
        row = records[0]["rows"][i]
        us = [r["contenders"]["native"]["us"] for record in records for r in record["rows"][i : i + len(dtypes)]]
        lines.append(table_row(f"({', '.join(map(str, row['shape']))})", row["fusion"], *(f"{x:,.0f}" for x in us)))
    sources = "\n".join(f"{name}: {provenance(r)}" for name, r in zip(names, records, strict=True))
    return "\n".join(lines) + f"\n\nForward + backward, median. {sources}"


def side_by_side(records: list[dict]) -> str:
    """Two runs of the kernel bench at the same shapes, by instruction set."""
    if len({row["dtype"] for row in records[0]["rows"]}) > 1:
        return by_dtype(records)
    names = [ISAS[record["environment"]["cpu_capability"]] for record in records]
    columns = [f"{name}: {what}" for name in names for what in ("µs", "× eager", "× compile")]
    lines = head("(B, M, C)", "fusion", *columns)
    for rows in zip(*(record["rows"] for record in records), strict=True):
        cells = []
        for row in rows:
            r = row["contenders"]["native"]
            cells += [f"{r['us']:,.0f}", f"{r['vs_eager']:.1f}", f"{r['vs_compile']:.1f}"]
        lines.append(table_row(f"({', '.join(map(str, rows[0]['shape']))})", rows[0]["fusion"], *cells))
    for title, kind in (("geometric mean", "geomean"), ("least", "least")):
        of = [record["summary"]["native"] for record in records]
        cells = [x for f in of for x in ("", f"**{f[f'{kind}_vs_eager']:.1f}**", f"**{f[f'{kind}_vs_compile']:.1f}**")]
        lines.append(table_row(title, "", *cells))
    sources = "\n".join(f"{name}: {provenance(r)}" for name, r in zip(names, records, strict=True))
    return "\n".join(lines) + f"\n\nForward + backward, fp32, median. {sources}"


def overhead(record: dict) -> str:
    """The way to the kernel, and the same training step before and now."""
    shapes = [f"({', '.join(map(str, step['shape']))})" for step in record["way"]]
    lines = head("µs", *shapes)
    for name, title in record["titles"].items():
        lines.append(table_row(title, *(f"{step['us'][name]:.1f}" for step in record["way"])))
    if all("processes" in step for step in record["way"]):
        turns = [step["processes"] for step in record["way"]]
        rest = [step["us"]["nothing"] for step in record["way"]]
        words = ", ".join(
            f"{x['before']:.1f} and {x['now']:.1f} µs at {shape}, without autograd's own {x['before'] - own:.1f} and "
            f"{x['now'] - own:.1f}"
            for x, own, shape in zip(turns, rest, shapes, strict=True)
        )
        lines += ["", f"A step at commit {turns[0]['commit'][:9]} and now, taking turns: {words}."]
    return "\n".join([*lines, "", f"Forward + backward, fp32, median: {provenance(record)}"])


def gpu(record: dict) -> str:
    """Both backends at many shapes."""
    lines = ["| (B, M, C) | dtype | fusion | copy, µs | triton | native | eager | % of the floor | triton, × eager |"]
    lines += ["|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in record["shapes"]:
        copy, triton, native, eager = row["copy_us"], row["triton"]["us"], row["native"]["us"], row.get("eager_us")
        numbers = f"{copy:.0f} | {triton:.0f} | {native:.0f} | {f'{eager:,.0f}' if eager else ''}"
        ratio = f"{eager / triton:.1f}" if eager else ""
        lines.append(
            f"| {tuple(row['shape'])} | {row['dtype']} | {row['fusion']} | {numbers} | "
            f"{100 * copy / min(triton, native):.0f} | {ratio} |"
        )
    note = f" {record['note']}" if "note" in record else ""
    return "\n".join([*lines, "", f"Forward + backward, median: {provenance(record)}{note}"])


def tried(record: dict) -> str:
    """What a kernel became, step by step."""
    shapes = [str(tuple(shape)) for shape in record["tried_at"]]
    lines = [f"| {' | '.join(shapes)} | what |", "|" + "--:|" * len(shapes) + "---|"]
    lines += [f"| {' | '.join(map(str, step['rows_us']))} | {step['what']} |" for step in record["tried"]]
    return "\n".join(lines)


def launches(record: dict) -> str:
    """A launch table: what Triton's rows kernel takes by the rule, and by the launch that was found."""
    lines = ["| bucket | by the rule, µs | by the table | columns at once | warps | registers at most |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for bucket, entry in record["launches"].items():
        cut = entry["launch"]
        how = f"{cut['block']}{'' if cut['on_chip'] else ', read twice'} | {cut['num_warps']} | {cut['maxnreg'] or ''}"
        lines.append(f"| {bucket} | {entry['us_by_rule']:.0f} | {entry['us']:.0f} | {how} |")
    return "\n".join([*lines, "", f"The rows alone: {provenance(record)}"])


def linear(record: dict) -> str:
    """Time and memory of the op that multiplies by the heads itself."""
    lines = [
        "Time of a step is relative to its matrix products alone; memory is the peak beyond inputs and outputs.",
        "",
    ]
    names = [name for name in record["steps"][0]["seconds"] if name != "products"]
    lines += head("N, H, H_m, V, M", "dtype", *names, "memory", "memory of eager")
    for row in record["steps"]:
        times = [f"{row['seconds'][name] / row['seconds']['products']:.2f}" for name in names]
        memory = [f"{row['memory'][name] / 2**20:.0f} MiB" for name in ("ours", "eager")]
        lines.append(table_row(", ".join(map(str, row["shape"])), row["dtype"], *times, *memory))
    for row in record["shared_head"]:
        ratio = row["seconds"]["5"] / row["seconds"]["1"]
        shape = ", ".join(map(str, row["shape"]))
        lines += [
            "",
            f"With one shared head and logit fusion ({shape}), M = 5 takes {ratio:.2f} times as long as M = 1.",
        ]
    return "\n".join([*lines, "", provenance(record)])


def bandwidth(record: dict, path: Path) -> str | None:
    """Draws the share of the copy bandwidth against C, a line for each backend and M; or says why it cannot."""
    figures = {}  # by fusion, backend and M: {C: %}, of the most rows
    for row in sorted(record["rows"], key=lambda row: row["shape"][0]):
        if (row["dtype"], row["layout"]) == tuple(record["rows"][0][key] for key in ("dtype", "layout")):
            for name, r in row["contenders"].items():
                if name != "copy" and "percent_of_copy" in r:
                    line = figures.setdefault(row["fusion"], {}).setdefault((name, row["shape"][1]), {})
                    line[row["shape"][2]] = r["percent_of_copy"]
    if not figures:
        return "the copy bandwidth was not measured"
    if len({row["shape"][2] for row in record["rows"]}) < 2:
        return "one number of classes makes no curve"
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(figures), figsize=(4 * len(figures), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (fusion, lines) in zip(panels[0], figures.items(), strict=True):
        for (name, snapshots), points in sorted(lines.items()):
            colour, marker = {"native": ("#4477aa", "o"), "triton": ("#cc3311", "s")}[name]
            style = ["-", "--", "-.", ":"][sorted({m for _, m in lines}).index(snapshots) % 4]
            axes.plot(
                *zip(*sorted(points.items()), strict=True),
                marker + style,
                color=colour,
                ms=4,
                label=f"{name}, M = {snapshots}",
            )
        axes.set(title=f"{fusion} fusion", xlabel="classes C", xscale="log", ylim=(0, None))
        axes.axhline(100, color="#888888", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    panels[0][0].set_ylabel("% of the copy bandwidth, on own traffic")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def memory_plot(record: dict, path: Path) -> None:
    """Peak memory of a step against the number of rows, ours and eager's."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    points = record["memory_by_rows"]["points"]
    for name, title in (("eager", "eager, all logits"), ("ours", "linear_ensemble_kd")):
        axes.plot([p["rows"] for p in points], [p["memory"][name] / 2**20 for p in points], marker="o", label=title)
    h, h_m, v, m = record["memory_by_rows"]["shape"]
    axes.set(xlabel=f"rows (H {h}, H_m {h_m}, V {v:,}, M {m}, fp32)", ylabel="MiB beyond inputs and outputs")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


TABLES = {"rows": bench, "way": overhead, "shapes": gpu, "launches": launches, "shared_head": linear}
