"""Runs side by side on one HTML page that needs no network: `runs.py` reads their records, `curves.py` makes charts of
them, `samples.py` shows what a run hears, `page.py` puts it together with ``page.css`` and ``page.js``."""

from cat.report.page import is_report, write_report

__all__ = ["is_report", "write_report"]
