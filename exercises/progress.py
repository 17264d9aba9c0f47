"""Which exercises pass: python exercises/progress.py [FOLDER]. FOLDER holds the answers; exercises/ if not given."""
import contextlib
import io
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


class Record:
    """A pytest plugin: what became of every check, by exercise."""

    def __init__(self):
        self.modules, self.checks = {}, {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.modules[item.module.__name__] = item.module
            self.checks.setdefault(item.module.__name__, {})[item.nodeid] = "failed"

    def pytest_runtest_makereport(self, item, call):
        error = call.excinfo and (call.excinfo.value.__cause__ or call.excinfo.value)    # Triton's interpreter wraps what a kernel raises
        if error is not None or call.when == "call":
            state = "passed" if error is None else "not begun" if isinstance(error, NotImplementedError) else "failed"
            self.checks[item.module.__name__][item.nodeid] = state

    def state(self, name: str) -> str:
        found = list(self.checks[name].values())
        if set(found) == {"not begun"}:
            return "not begun"
        return "passes" if set(found) == {"passed"} else f"{found.count('passed')} of {len(found)} checks pass"


def main(folder: str | None = None) -> None:
    answers = Path(folder).resolve() if folder else HERE
    if not answers.is_dir():
        sys.exit(f"{folder} is no folder")
    os.environ["DRIRL_IMPL"] = str(answers)
    record, printed = Record(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        pytest.main(["-q", "--tb=no", str(HERE.parent / "tests" / "exercises")], plugins=[record])
    if not record.checks:
        sys.exit(printed.getvalue())
    print("| exercise | state | mirrors | WALKTHROUGH.md |\n|---|---|---|---|")
    for name, module in sorted(record.modules.items()):
        print(f"| {name.removeprefix('test_')} | {record.state(name)} | {', '.join(module.MIRRORS)} | {module.SECTION} |")
    print(f"{sum(record.state(name) == 'passes' for name in record.checks)} of {len(record.checks)} pass")


if __name__ == "__main__":
    main(*sys.argv[1:2])
