"""`my`: the functions that an exercise's tests grade.

They are the project's own unless DRIRL_IMPL names a folder of answers, or one file of them. Then
the first failure ends the run. It says where to read on. An exercise that isn't begun, or can't be
imported, takes one line.
"""

import os
from pathlib import Path

import pytest

from exercises.grading import ROOT, Unusable, answers, where

GIVEN = os.environ.get("DRIRL_IMPL", "")


def pytest_configure(config):
    if GIVEN and not (ROOT / GIVEN).exists():
        raise pytest.UsageError(f"DRIRL_IMPL={GIVEN}: {ROOT / GIVEN} is neither folder nor file")
    if GIVEN:  # one cause may fail many checks
        config.option.maxfail = config.option.maxfail or 1
        config.option.tbstyle = config.option.tbstyle.replace("auto", "short")
        config.option.reportchars = config.option.reportchars.replace("fE", "")  # said above it


def pytest_collection_modifyitems(items):
    for item in items if GIVEN else ():  # a learner's code may warn
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


def pytest_report_header():
    own = "the project's own functions (DRIRL_IMPL not set)"
    return f"grading: {GIVEN if GIVEN else own}"


@pytest.fixture(scope="module")
def my(request):
    exercise = request.module.__name__.rpartition(".test_")[2]
    return answers(exercise, request.module, GIVEN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.read = where(item.module.SECTION)
        report.sections.append(("read", report.read))
        error = call.excinfo.value.__cause__ or call.excinfo.value  # Triton's interpreter wraps
        if isinstance(call.excinfo.value, Unusable):
            report.why = str(call.excinfo.value)
        elif isinstance(error, NotImplementedError) and not error.args:
            report.why = "not begun"
    return report


def pytest_report_teststatus(report):
    if why := getattr(report, "why", None):  # still a failure, but no traceback
        return "not graded", "-", why


def pytest_terminal_summary(terminalreporter):
    found = {}
    for report in terminalreporter.stats.get("not graded", []):
        exercise = report.nodeid.partition("test_")[2].partition(".py")[0]
        found[exercise] = report
    for exercise, report in found.items():
        file = GIVEN if GIVEN.endswith(".py") else f"{GIVEN.rstrip('/')}/{exercise}.py"
        terminalreporter.write_line(f"{exercise[:4]} {report.why} ({file}); read {report.read}")
