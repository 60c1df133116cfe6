"""The command line that draws a run: python -m eekd.report RUN writes RUN/report.html."""

import argparse

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.report.page import report

PARSER = argparse.ArgumentParser(prog="eekd report", description="Draws a run as an HTML page.")
PARSER.add_argument("run", help="a run folder of eekd train")
PARSER.add_argument("--out", help="the file to write (default: RUN/report.html)")


def main(argv: list[str] | None = None) -> int:
    return command.answer(PARSER, argv, _report, (ImportError, OSError, ValueError))


def _report(given: argparse.Namespace) -> int:
    print(report(given.run, given.out))
    return 0


if __name__ == "__main__":
    command.run(main)
