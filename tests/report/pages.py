"""The report's page as its reader has it, and runs that are not whole."""

import json
import shutil
from html.parser import HTMLParser

from eekd.io.files import read_json
from eekd.report.page import SECTIONS, report

STUDENTS = "ce", "last", "uniform", "confidence", "attention"
NAMES = [draw.__name__ for draw in SECTIONS.values()]
VOID = "meta", "br"


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


ONLY_CONFIG = without("students", "teacher", "summary.json", "environment.json")
