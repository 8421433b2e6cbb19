"""Running the kit from a program: the checks of one contract class, and the result of each."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from keymgmt.errors import ConfigError
from keymgmt.testing._contract import ProviderContract
from keymgmt.testing._demand import Demand

__all__ = ["Result", "run_contract"]

Outcome = Literal["passed", "failed", "skipped"]

_STUB: Final = "from keymgmt.testing._run import stub\n\nTestProvider = stub.contract\n"
_MODULE: Final = "test_provider"
_QUIET: Final = ("terminal", "cacheprovider", "faulthandler")


@dataclass(frozen=True)
class Result:
    """One check: its name, what it demands, how it ended, the reason where it did not pass."""

    name: str
    demands: str
    outcome: Outcome
    reason: str
    seconds: float


class _Stub:
    """Carries the class into the file that pytest collects."""

    contract: type[ProviderContract] | None = None


stub = _Stub()


class _Listener:
    """A plugin of pytest that makes a result from the set-up, call and teardown of each check."""

    def __init__(self, report_result: Callable[[Result], None]) -> None:
        self.results: list[Result] = []
        self.errors: list[str] = []
        self._demands: dict[str, str] = {}
        self._reports: list[pytest.TestReport] = []
        self._report_result = report_result

    def pytest_itemcollected(self, item: Any) -> None:
        self._demands[item.nodeid] = Demand(item.function.__doc__).text

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(report.longreprtext)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        if isinstance(excinfo.value, pytest.exit.Exception):
            self.errors.append(str(excinfo.value))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)
        if report.when == "teardown":
            # The first that failed, else the first that skipped, else the last.
            worst = min(self._reports[::-1], key=lambda r: (r.passed, r.skipped))
            reason = worst.longreprtext
            if isinstance(worst.longrepr, tuple):
                reason = worst.longrepr[2].removeprefix("Skipped: ")
            elif worst.failed and worst.when != "call":
                reason = f"in {worst.when}: {reason}"
            name, demands = report.nodeid.rpartition("::")[2], self._demands[report.nodeid]
            seconds = sum(each.duration for each in self._reports)
            self.results.append(Result(name, demands, worst.outcome, reason, seconds))
            self._reports = []
            self._report_result(self.results[-1])


def run_contract(
    contract: type[ProviderContract],
    *,
    junit: Path | None = None,
    suite: str = "keymgmt",
    properties: Sequence[tuple[str, str]] = (),
    report_result: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Run every check of ``contract`` in this process.

    Args:
        contract: the class with its fixtures.
        junit: file to write a JUnit report to.
        suite: name of the suite in that report.
        properties: names and values for that report.
        report_result: called with each result as soon as it is known.

    Raises:
        ConfigError: pytest could not run the checks, or not all of them.
    """

    class Properties:
        @pytest.fixture(scope="session", autouse=True)
        def _versions(self, record_testsuite_property: Any) -> None:
            for name, value in properties:
                record_testsuite_property(name, value)

    listener = _Listener(report_result)
    with tempfile.TemporaryDirectory(prefix="keymgmt-kit-") as directory:
        file = Path(directory) / f"{_MODULE}.py"
        file.write_text(_STUB)
        arguments = [
            str(file),
            "-c",
            os.devnull,
            "--rootdir",
            directory,
            "-o",
            "junit_family=xunit2",
        ]
        arguments += ["--import-mode=importlib", "--disable-plugin-autoload"]
        arguments += [part for name in _QUIET for part in ("-p", f"no:{name}")]
        arguments += ["--basetemp", str(Path(directory) / "tmp"), "-o", f"junit_suite_name={suite}"]
        plugins: list[object] = [listener]
        if junit is not None:
            arguments.append(f"--junitxml={junit}")
            plugins.append(Properties())
        stub.contract = contract
        try:
            code = pytest.main(arguments, plugins)
        finally:
            stub.contract = None
            sys.modules.pop(_MODULE, None)  # otherwise the next run would get this module again
    if code == pytest.ExitCode.INTERRUPTED and not listener.errors:
        raise KeyboardInterrupt
    if listener.errors or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ConfigError(
            "the checks could not be run: " + ("; ".join(listener.errors) or f"pytest said {code}")
        )
    return listener.results
