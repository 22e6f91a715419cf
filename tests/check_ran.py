"""Fails unless a pytest report shows that tests really ran: `python tests/check_ran.py REPORT.xml LEAST`.

pytest exits 0 when every test was skipped, when it was told to collect only, or when a plug-in deselected all.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def count_passed(report: Path) -> int:
    """Return how many tests of the report passed."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))

    def total(name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites)

    return total("tests") - total("skipped") - total("failures") - total("errors")


def main() -> int:
    """Print the verdict and return the exit status."""
    report, least = Path(sys.argv[1]), int(sys.argv[2])
    if not report.is_file():
        print(f"no test ran: {report} was not written", file=sys.stderr)
        return 1
    passed = count_passed(report)
    if passed < least:
        print(f"only {passed} tests passed, at least {least} are expected: did the session run?", file=sys.stderr)
        return 1
    print(f"{passed} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
