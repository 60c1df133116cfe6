"""A run as one HTML page: python -m eekd.report RUN."""

from eekd.report.page import report

__all__ = ["report"]
