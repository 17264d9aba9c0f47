"""`my`: the functions that an exercise's tests grade.

They are the project's own unless DRIRL_IMPL names a folder of answers. A failure says where to read
on. An exercise that isn't begun, or can't be imported, takes one line.
"""

import os
from pathlib import Path

import pytest

from exercises.grading import ROOT, Unusable, answers

FOLDER = os.environ.get("DRIRL_IMPL", "")


def pytest_configure():
    if FOLDER and not (ROOT / FOLDER).is_dir():
        raise pytest.UsageError(f"DRIRL_IMPL={FOLDER}: {ROOT / FOLDER} is no folder")


def pytest_collection_modifyitems(items):
    for item in items if FOLDER else ():  # a learner's code may warn
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


def pytest_report_header():
    own = "the project's own functions (DRIRL_IMPL not set)"
    return f"grading: {FOLDER + '/' if FOLDER else own}"


@pytest.fixture(scope="module")
def my(request):
    exercise = request.module.__name__.rpartition(".test_")[2]
    return answers(exercise, request.module.MIRRORS, FOLDER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        where = f"teach/WALKTHROUGH.md, section {item.module.SECTION!r}"
        report.sections.append(("read on", where))
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
        found[exercise] = report.why
    for exercise, why in found.items():
        terminalreporter.write_line(f"{exercise[:4]} {why} ({FOLDER}/{exercise}.py)")
