"""A run that is killed again and again ends as one that was left alone."""

import subprocess
import sys
from pathlib import Path


def test_killed_and_resumed_run_equals_an_undisturbed_one():
    # As a person would, with more kills: `python -m benchmarks.soak`.
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--kills", "1"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kills changed nothing" in result.stdout
