"""`my`: the functions that an exercise's tests grade, the project's own unless DRIRL_IMPL names a folder of answers. A failure says where to read on."""
import os

import pytest
from grading import answers


@pytest.fixture(scope="module")
def my(request):
    return answers(request.module.__name__.removeprefix("test_"), request.module.MIRRORS, os.environ.get("DRIRL_IMPL"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("read on", f"WALKTHROUGH.md, section {item.module.SECTION!r}"))
    return report
