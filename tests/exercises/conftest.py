"""`my`: the functions that an exercise's tests grade, the project's own unless DRIRL_IMPL names a folder of answers. A failure says where to read on; an
exercise that isn't begun, or can't be imported, takes one line."""

import os
from pathlib import Path

import pytest
from grading import ROOT, Unusable, answers

FOLDER = os.environ.get("DRIRL_IMPL")


def pytest_configure():
    if FOLDER and not (ROOT / FOLDER).is_dir():
        raise pytest.UsageError(f"DRIRL_IMPL={FOLDER}: {ROOT / FOLDER} is no folder")


def pytest_collection_modifyitems(items):
    for item in items if FOLDER else ():  # a learner's code may warn
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


def pytest_report_header():
    return (
        f"grading: {FOLDER}/"
        if FOLDER
        else "grading: the project's own functions (DRIRL_IMPL not set)"
    )


@pytest.fixture(scope="module")
def my(request):
    return answers(request.module.__name__.removeprefix("test_"), request.module.MIRRORS, FOLDER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("read on", f"WALKTHROUGH.md, section {item.module.SECTION!r}"))
        error = (
            call.excinfo.value.__cause__ or call.excinfo.value
        )  # Triton's interpreter wraps what a kernel raises
        if isinstance(call.excinfo.value, Unusable):
            report.why = str(call.excinfo.value)
        elif isinstance(error, NotImplementedError) and not error.args:
            report.why = "not begun"
    return report


def pytest_report_teststatus(report):
    if why := getattr(report, "why", None):  # still a failure, but no traceback
        return "not graded", "-", why


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("not graded", [])
    for exercise, why in dict.fromkeys(
        (r.nodeid.partition("test_")[2].partition(".py")[0], r.why) for r in reports
    ):
        terminalreporter.write_line(f"{exercise[:4]} {why} ({FOLDER}/{exercise}.py)")
