"""The report shows what the run recorded, whole or not, loads nothing, and a browser draws all of it."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eekd.io.files import read_json
from eekd.report import charts
from eekd.report.__main__ import main
from eekd.report.page import SECTIONS, report
from eekd.train import train
from eekd.train.config import Config, Student, Teacher

STUDENTS = "ce", "last", "uniform", "confidence", "attention"
NAMES = [draw.__name__ for draw in SECTIONS.values()]
VOID = "meta", "br"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two snapshots and five students, made once; every test gets a copy."""
    shape = dict(model="resnet8_w4", epochs=4, batch_size=60)
    teacher, student = Teacher(**shape, snapshots=2), Student(**shape)
    config = Config(
        teacher=teacher,
        student=student,
        students=STUDENTS,
        train_limit=180,
        device="cpu",
        precision="fp32",
        channels_last=False,
    )
    return train(config, tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture
def run(trained, tmp_path):
    """A copy without the hashes of files that tests rewrite."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in run.glob("**/*.json"):
        rewrite(path, lambda value: {name: value[name] for name in value if name not in ("metrics", "config_sha256")})
    return run


class Page(HTMLParser):
    """The text of each section, the charts in it and all attributes; ValueError where tags are not nested."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.charts, self.attributes, self.tags = [], {"": ""}, {}, [], set()
        self.at = ""
        self.feed(text)
        if self.open:
            raise ValueError(f"left open: {self.open}")

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.at = dict(attributes)["id"]
            self.words[self.at], self.charts[self.at] = "", 0
        if tag == "svg" and self.at:
            self.charts[self.at] += 1

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes another")
        self.at = "" if tag == "section" else self.at

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.words[self.at] += f"{text} "


def drawn(run, **options) -> Page:
    return Page(report(run, **options).read_text())


def rewrite(path, change):
    value = read_json(path)
    path.write_text(json.dumps(change(value) or value))


def rows_of(run, student):
    return list(map(json.loads, (run / "students" / student / "metrics.jsonl").read_text().splitlines()))


# A whole run


def test_the_table_is_the_summary(run):
    words = drawn(run).words["results"]
    for row in json.loads((run / "summary.json").read_text())["rows"]:
        gain, seconds = row["gain"], row["seconds_per_epoch"]
        cells = [
            row["model"],
            f"{row['parameters']:,}",
            str(row["epochs"]),
            f"{100 * row['val_accuracy']:.2f}",
            f"{100 * row['test_accuracy']:.2f}",
        ]
        cells += [f"{100 * gain:+.2f}".replace("-", "−")] if gain is not None and row["name"] != "ce" else []
        cells += [f"{seconds:.2f}"] if seconds is not None else []
        assert " ".join(cells) in words
    error = 100 * math.sqrt(0.25 / json.loads((run / "environment.json").read_text())["data"]["test"])
    told = float(re.search(r"images, ([\d.]+) points", words)[1])
    assert 0 < told <= error + 0.01


def test_points_carry_the_recorded_values(run):
    rows = [
        row | {"weights": [0.3 + epoch / 100, 0.7 - epoch / 100]}
        for epoch, row in enumerate(rows_of(run, "attention"), 1)
    ]
    (run / "students/attention/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, row = drawn(run), rows[2]
    assert "snapshot 1, epoch 3: 0.33" in page.words["attention"]
    assert "uniform: 0.5" in page.words["attention"] and "uniform: 0.6931" in page.words["attention"]
    assert "snapshot 2, epoch 3: 0.67" in page.words["attention"]
    assert f"weights, epoch 3: {row['weight_entropy']:.4g}" in page.words["attention"]
    assert f"EEKD (attention), epoch 3: {100 * row['val_accuracy']:.4g}" in page.words["curves"]
    assert f"these weights, epoch 3: {row['val_target_nll']:.4g}" in page.words["uniform"]
    assert f"uniform weights, epoch 3: {row['val_kd_loss_uniform']:.4g}" in page.words["uniform"]
    known = json.loads((run / "teacher/snapshots.json").read_text())["test"]
    assert f"snapshot 1 and 2: {100 * known['disagreement'][0][1]:.2f} %" in page.words["disagreement"]
    for member in known["members"]:
        assert f"{member['name']}   ECE {100 * member['ece']:.1f} %" in page.words["snapshots"]
    last = 100 * known["members"][1]["accuracy"]
    assert f"test, epoch of the snapshot 4: {last:.4g}" in page.words["snapshots"]


def test_cost_adds_up(run):
    words, rows = drawn(run).words["cost"], rows_of(run, "uniform")
    assert f"uniform, snapshots' forward: {sum(row['seconds_teacher'] for row in rows) / 4:.3g}" in words
    assert f"{sum(row['seconds'] for row in rows) / 4:.3g}" in words


def test_settings_and_environment_are_there(run):
    words, here = drawn(run).words["settings"], json.loads((run / "environment.json").read_text())
    for told in (
        "students ce, last, uniform, confidence, attention",
        "val_fraction 0.1",
        "batch_size 60",
        "temperature 5.0",
        "detach_query true",
        "root none",
        f"torch {here['torch']}",
        f"commit {here['commit'] or 'none'}",
        here["data"]["fingerprint"],
        sys.orig_argv[0],
    ):
        assert told in words


@pytest.mark.parametrize(
    "own, even, verdict",
    [
        (
            0.4,
            0.6,
            "no: in the last epoch its −log p of the true label is 0.400, with uniform weights 0.600; "
            "it was lower in 4 of 4 epochs.",
        ),
        (
            0.6,
            0.4,
            "yes: in the last epoch its −log p of the true label is 0.600, with uniform weights 0.400; "
            "it was lower in 0 of 4 epochs.",
        ),
        (0.5, 0.5, "neither better nor worse"),
    ],
)
def test_the_verdict_on_uniform_weights(run, own, even, verdict):
    known = {"val_target_nll": own, "val_target_nll_uniform": even}
    lines = "".join(json.dumps(row | known) + "\n" for row in rows_of(run, "attention"))
    (run / "students/attention/metrics.jsonl").write_text(lines)
    words = drawn(run).words["uniform"].partition("EEKD (attention)")[2]
    assert f"For the target, {verdict}" in words
    other = json.loads((run / "students/uniform/student.json").read_text())["test"]["accuracy"]
    assert f"the one trained with uniform weights {100 * other:.2f} %" in words


def test_the_page_needs_nothing_else(run):
    page = drawn(run)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a"}
    assert not [
        value for name, value in page.attributes if name in ("src", "href", "srcset", "data") or name.startswith("on")
    ]
    text = (run / "report.html").read_text()
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert len(text) < 200_000


def test_out_names_the_file(run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'page.html'}\n"
    assert (tmp_path / "new" / "page.html").is_file() and not (run / "report.html").exists()


# A run that is not whole


def whole(run):
    pass


def without(*names):
    def change(run):
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return change


def cut(run):
    """Stopped in the third epoch of the attention's student, in the middle of writing a row."""
    without("summary.json", "students/attention/student.json")(run)
    path = run / "students/attention/metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:2]) + rows[2][:40])


def teacher_only(run):
    without("students")(run)
    rewrite(run / "config.json", lambda config: config | {"students": []})
    rewrite(run / "summary.json", lambda summary: summary | {"rows": summary["rows"][:4]})


def in_teacher(run):
    without("students", "summary.json", "teacher/snapshots.json")(run)
    rewrite(run / "teacher/manifest.json", lambda manifest: manifest["snapshots"].pop() and None)
    rows = (run / "teacher/metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "teacher/metrics.jsonl").write_text("".join(rows[:3]))


def untimed(run):
    for path in run.glob("**/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ONLY_CONFIG = without("students", "teacher", "summary.json", "environment.json")


@pytest.mark.parametrize(
    "change, sentences",
    [
        (without("summary.json"), {"": "The run has not ended: there is no summary.json yet."}),
        (
            cut,
            {
                "": "EEKD (attention): 2 of 4 epochs, and no final measurements yet.",
                "attention": "snapshot 1, epoch 2: ",
                "results": "EEKD (attention) resnet8_w4",
            },
        ),
        (
            teacher_only,
            {
                "": "No student: this run trains a teacher only.",
                "results": "No gain without the test accuracy of a CE student",
                "attention": "No student here has weights that depend on the sample.",
                "uniform": "No student here weighs several snapshots other than uniformly.",
            },
        ),
        (
            in_teacher,
            {
                "": "teacher: 3 of 4 epochs, and no final measurements yet.",
                "results": "snapshot 1 resnet8_w4",
                "snapshots": "There is no snapshots.json yet",
                "disagreement": "no pair of snapshots",
                "curves": "teacher, epoch 3: ",
            },
        ),
        (without("students/attention"), {"": "EEKD (attention): not found.", "attention": "confidence (CA-MKD)"}),
        (without("teacher"), {"": "teacher: not found.", "curves": "CE only, epoch 4"}),
        (without("environment.json"), {"settings": "There is no environment.json."}),
        (untimed, {"cost": "No epoch has been timed yet."}),
        (ONLY_CONFIG, {"": "CE only: not found.", "curves": "No epoch has been trained yet."}),
    ],
)
def test_what_is_missing_is_said(run, change, sentences):
    change(run)
    page = drawn(run)
    assert list(page.charts) == NAMES
    for section, sentence in sentences.items():
        assert sentence in " ".join(page.words[section].split())


def test_the_table_is_the_same_before_the_summary_is_written(run):
    """But for the parameters, which only the summary knows."""
    whole = re.sub(r"resnet8_w4 [\d,]+", "resnet8_w4", " ".join(drawn(run).words["results"].split()))
    without("summary.json")(run)
    assert whole == " ".join(drawn(run).words["results"].split())


def test_a_students_run_finds_its_teacher_elsewhere(run, tmp_path, monkeypatch):
    """From any working folder, by the student's own note; without one, by the path in the config."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    without("teacher")(other)
    rewrite(other / "config.json", lambda config: config | {"teacher_run": "run"})
    for path in other.glob("students/*/student.json"):
        rewrite(path, lambda known: known["teacher"] and known["teacher"].update(run="../../../run/teacher"))
    monkeypatch.chdir("/")
    assert "teacher, epoch 4" in drawn(other).words["curves"]
    for path in other.glob("students/*/student.json"):
        rewrite(path, lambda known: known | {"teacher": known["teacher"] and ["no note"]})
    assert "teacher, epoch 4" not in drawn(other).words["curves"]
    monkeypatch.chdir(tmp_path)
    assert "teacher, epoch 4" in drawn(other).words["curves"]


def test_not_a_number_is_a_gap(run):
    path = run / "students/ce/metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows[1] = re.sub(r'"val_accuracy": [\d.]+', '"val_accuracy": NaN', rows[1])
    path.write_text("".join(rows))
    text = report(run).read_text()
    assert "CE only, epoch 1: " in text and "nan" not in text.lower()


HOSTILE = "</style><script>alert('1')</script>&\"\ud800"


def test_text_from_files_stays_text(run):
    rewrite(run / "config.json", lambda config: config | {"data": HOSTILE.replace("/", ":")})
    rewrite(run / "environment.json", lambda here: here | {"device": HOSTILE, "command": [HOSTILE], HOSTILE: HOSTILE})
    rewrite(
        run / "summary.json",
        lambda summary: [row.update(name=HOSTILE, model=HOSTILE) for row in summary["rows"]] and None,
    )
    rewrite(
        run / "teacher/snapshots.json",
        lambda known: [member.update(name=HOSTILE) for member in known["test"]["members"]] and None,
    )
    (run / "students/ce").rename(run / "students" / "<b onload='x'>")
    page = drawn(run)
    shown = HOSTILE.replace("\ud800", "?")
    assert not page.tags & {"script", "b onload='x'"} and page.words["results"].count(shown) == 18
    assert shown in page.words["settings"] and shown in page.words["snapshots"]
    assert "<b onload='x'>, epoch 4" in page.words["curves"]


# Bad folders


def write(name, text):
    return lambda run: (run / name).write_text(text)


def edit(name, **changes):
    return lambda run: rewrite(run / name, lambda value: value | changes)


def add(name, text):
    return lambda run: (run / name).open("a").write(text)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: shutil.rmtree(run), "run must be a run folder, got one without config.json"),
        (without("config.json"), "run must be a run folder, got one without config.json"),
        (lambda run: (shutil.rmtree(run), run.write_text("")), "run must be a run folder"),
        (write("config.json", "{"), "config.json: the config is not JSON"),
        (write("config.json", "[]"), "config.json: the config must be an object"),
        (edit("config.json", sede=1), "config.json: sede is not a setting; did you mean 'seed'?"),
        (write("environment.json", "{}"), "environment.json must be an object with format 1"),
        (write("environment.json", '{"format": 1}'), "is not written as eekd.train.run_folder says: KeyError"),
        (write("summary.json", "[1]"), "summary.json must be an object with format 1"),
        (edit("summary.json", format=2), "summary.json must be an object with format 1"),
        (edit("summary.json", rows=[{}]), "is not written as eekd.train.run_folder says: KeyError"),
        (edit("summary.json", rows=None), "is not written as eekd.train.run_folder says: TypeError"),
        (write("summary.json", '{"format": 1, "seconds": NaN}'), "summary.json is not JSON: NaN is not a number"),
        (write("teacher/manifest.json", '{"format": 1}'), "manifest.json is no manifest of snapshots"),
        (write("teacher/snapshots.json", "half"), "snapshots.json is not JSON"),
        (edit("teacher/snapshots.json", test=[]), "is not written as eekd.train.run_folder says: TypeError"),
        (edit("teacher/snapshots.json", test={"members": []}), "is not written as eekd.train.run_folder says"),
        (write("students/ce/student.json", "\x80"), "student.json is not JSON"),
        (edit("students/last/student.json", format="1"), "student.json must be an object with format 1"),
        (edit("students/last/student.json", test=None), "is not written as eekd.train.run_folder says: TypeError"),
        (add("students/ce/metrics.jsonl", "not a row\n"), "metrics.jsonl, line 5 is not JSON"),
        (add("students/ce/metrics.jsonl", "[5]\n"), "metrics.jsonl, line 5 must be an object with an epoch"),
        (add("teacher/metrics.jsonl", '{"epoch": "5"}\n'), "line 5 must be an object with an epoch"),
        (add("teacher/metrics.jsonl", '{"epoch": 5, "val_loss": "<b>"}\n'), "is not written as eekd.train"),
        (lambda run: (run / "report.html").mkdir(), "report.html"),
    ],
)
def test_a_bad_folder_ends_in_one_sentence(run, change, message, capsys):
    change(run)
    assert main([str(run)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert not list(run.glob("**/*.tmp")) and not (run / "report.html").is_file()


@pytest.mark.bad_input
@pytest.mark.parametrize("argv", [[], ["a", "b"], ["a", "--to", "b"]])
def test_bad_flags_end_in_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: eekd report" in capsys.readouterr().err


# Charts


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.integers(1, 12), st.booleans())
def test_ticks_are_round_and_inside(low, width, count, whole):
    width *= max(abs(low), 1)
    found = charts.ticks(low, low + width, count, whole=whole)
    slack = 2e-3 * width  # less than a pixel
    assert all(low - slack <= tick <= low + width + slack for tick in found) and len(found) <= count + 1
    steps = [b - a for a, b in pairwise(found)]
    if steps:
        assert max(steps) == pytest.approx(min(steps), rel=1e-5)
        assert f"{min(steps):.3e}"[0] in "125" and (not whole or min(steps) >= 0.999)


@given(st.floats(1e-6, 1e3), st.floats(4.1, 1e6))
def test_log_ticks_rise_by_round_factors(low, factor):
    found = charts.ticks(low, low * factor, 5, log=True)
    assert found and all(low <= tick <= low * factor and f"{tick:e}"[0] in "125" for tick in found)


@given(st.lists(st.floats(-50, 300), min_size=1, max_size=16))
def test_names_at_the_ends_never_overlap(wanted):
    places = charts.spread(wanted, 15, 0, 250)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    assert all(places[b] - places[a] >= 15 - 1e-9 for a, b in pairwise(order))
    assert min(places) >= -1e-9 and max(places) <= 250


def test_far_apart_names_stay_where_their_lines_end():
    assert charts.spread([100, 20, 60], 15, 0, 250) == [100, 20, 60]


def test_a_gap_parts_a_line():
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, 0.0)]
    whole, log = (
        charts.lines("title", "x", "y", [charts.Line("name", "red", points)], log=log) for log in (False, True)
    )
    pens = [re.search(r'd="([^"]*)" class="line"', str(chart))[1] for chart in (whole, log)]
    assert [re.sub("[^ML]", "", pen) for pen in pens] == ["MLML", "MLM"]
    assert "title: not recorded." in charts.lines("title", "x", "y", [charts.Line("name", "red", [(1, None)])])


def test_tag_escapes_all_but_markup():
    inner = charts.tag("b", "<i>", class_="'\"")
    assert inner == '<b class="&#x27;&quot;">&lt;i&gt;</b>'
    assert charts.tag("p", inner, None, 0.123456789, stroke_width=None) == f"<p>{inner}0.12346</p>"


def luminance(colour):
    colour = colour.lstrip("#")
    colour = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_can_be_seen_on_the_page(mode):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for lines and discs."""
    found = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", charts.style())
    palette = {name: colours[mode] for name, *colours in found}
    assert {"ink", "quiet", "early", "late", "teacher", *STUDENTS} <= palette.keys()
    page = luminance(palette.pop("page"))
    palette.pop("faint")  # grid lines
    for name, colour in palette.items():
        high, low = sorted((page, luminance(colour)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("ink", "quiet") else 3), name


# A browser

PROBE = """<script>
const found = [], place = element => element.getBoundingClientRect();
const outside = (a, box, slack) => a.left < box.left - slack || a.right > box.right + slack ||
  a.top < box.top - slack || a.bottom > box.bottom + slack;
const overlap = (a, b) => Math.max(a.left, b.left) < Math.min(a.right, b.right) - 1 &&
  Math.max(a.top, b.top) < Math.min(a.bottom, b.bottom) - 3;
for (const section of document.querySelectorAll("section")) {
  const faults = [], figures = section.querySelectorAll("figure svg");
  for (const svg of figures) {
    const box = place(svg), texts = [...svg.querySelectorAll("text")];
    if (box.width < 80 || box.height < 60) faults.push("too small: " + svg.getAttribute("aria-label"));
    texts.forEach((text, i) => {
      if (outside(place(text), box, 1)) faults.push("outside: " + text.textContent);
      for (const other of texts.slice(0, i))
        if (overlap(place(text), place(other))) faults.push(other.textContent + " on " + text.textContent);
    });
    for (const mark of svg.querySelectorAll("circle, rect, .line"))
      if (outside(place(mark), box, 8)) faults.push("outside: " + mark.outerHTML.slice(0, 80));
  }
  const colours = [...section.querySelectorAll(".fill, .line")].map(e => getComputedStyle(e).color);
  found.push({id: section.id, height: section.getBoundingClientRect().height, figures: figures.length, faults,
              invisible: colours.filter(c => c == getComputedStyle(document.body).backgroundColor).length});
}
const wide = document.documentElement.scrollWidth - innerWidth;
document.body.innerHTML = "<pre id=probe></pre>";
document.getElementById("probe").textContent = JSON.stringify({wide, found});
</script></body>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    flags = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "hide-scrollbars",
        "enable-logging=stderr",
        "dump-dom",
    )

    def open_(path, *more):
        """The page as the browser has it, and what it wrote to its console."""
        with_profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        command = [program, *(f"--{flag}" for flag in (*flags, *more)), with_profile, f"file://{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_


def test_the_browser_has_nothing_to_complain_about(run, browser, tmp_path):
    """The page as it is, then one with a fault of each kind, which would have been noticed."""
    text, console = browser(report(run))
    assert console == [] and text.rstrip().endswith("</html>")
    faults = '<svg><path d="Mnan"/></svg><script>1</script></body>'
    (tmp_path / "bad.html").write_text((run / "report.html").read_text().replace("</body>", faults))
    console = " ".join(browser(tmp_path / "bad.html")[1])
    assert "Mnan" in console and "Content Security Policy" in console


@pytest.mark.parametrize(
    "flags",
    [
        ("window-size=1280,900", "blink-settings=preferredColorScheme=1"),
        ("window-size=500,900", "blink-settings=preferredColorScheme=0"),
    ],
    ids=["wide light", "narrow dark"],
)
@pytest.mark.parametrize("change", [whole, cut, ONLY_CONFIG], ids=["whole", "cut", "empty"])
def test_the_browser_draws_every_section(run, browser, tmp_path, change, flags):
    change(run)
    text = report(run).read_text()
    path = tmp_path / "probe.html"
    path.write_text(text.replace(charts.POLICY, "").replace("</body>", PROBE))
    text, console = browser(path, *flags)
    probe = json.loads(re.search(r'<pre id="probe">(.*)</pre>', text)[1])
    assert console == [] and probe["wide"] <= 0
    assert [section["id"] for section in probe["found"]] == NAMES
    for section in probe["found"]:
        assert section["height"] > 40 and section["faults"] == [] and section["invisible"] == 0, section
    if change is whole:
        figures = {section["id"]: section["figures"] for section in probe["found"]}
        assert figures == {
            "results": 0,
            "curves": 4,
            "snapshots": 5,
            "disagreement": 1,
            "attention": 4,
            "uniform": 4,
            "cost": 1,
            "settings": 0,
        }


def test_the_command_runs_without_optional_packages(run):
    """python -m eekd.report needs the core dependencies only."""
    absent = ["plotly", "matplotlib", "tyro", "rich", "sklearn", "tensorboard"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); "
        "runpy.run_module('eekd.report', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{run / 'report.html'}\n", done.stderr
