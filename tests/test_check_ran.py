"""A test session that ran nothing fails CI, whatever pytest's own exit status was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent / "check_ran.py"
SESSION = "import pytest\n{decorator}\n@pytest.mark.parametrize('n', range(5))\ndef test_one(n): pass\n"


@pytest.mark.parametrize(
    ("decorator", "arguments", "is_fine"),
    [
        ("", [], True),
        ("", ["--collect-only"], False),
        ("", ["-k", "nothing_of_that_name"], False),
        ("", ["-k", "0 or 1"], False),
        ("@pytest.mark.skip", [], False),
    ],
)
def test_a_session_counts_only_with_enough_passed_tests(tmp_path, decorator, arguments, is_fine):
    (tmp_path / "test_it.py").write_text(SESSION.format(decorator=decorator))
    report = tmp_path / "report.xml"
    session = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *arguments,
        "test_it.py",
    ]
    subprocess.run(session, cwd=tmp_path, capture_output=True)
    check = subprocess.run([sys.executable, CHECK, report, "5"], capture_output=True, text=True)
    assert (check.returncode == 0) is is_fine, check.stderr
    assert ("5 passed, 0 failed" in check.stdout) is is_fine
