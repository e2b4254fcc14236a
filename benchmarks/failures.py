"""A plugin of pytest, `-p benchmarks.failures`: prints each failure in a line when it happens, with pytest-xdist too.

FAILED tests/kernels/test_loss.py::test_rows: error 0.3 > 0.1 allowed
"""

from __future__ import annotations

import pytest

_CONFIG: list[pytest.Config] = []


def pytest_configure(config: pytest.Config) -> None:
    _CONFIG[:] = [config]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _tell("FAILED" if report.when == "call" else "ERROR", report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _tell("ERROR", report)


def _tell(what: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    reporter = _CONFIG[0].pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # there is none in a worker, whose reports come to the process that started it
        reporter._tw.line()  # ends the line of dots
        reporter.write_line(f"{what} {report.nodeid}: {_reason(report)}")
        reporter._tw.flush()


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The line that pytest marks as the error."""
    lines = report.longreprtext.splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["no reason given"])[0][:200]
