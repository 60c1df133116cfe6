"""A browser draws every section."""

import json
import re
import shutil
import subprocess

import pytest
from pages import NAMES, ONLY_CONFIG, cut, whole

from eekd.report import charts
from eekd.report.page import report

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
