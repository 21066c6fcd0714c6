"""Each stage is stopped a few times and started again (slow): python tests/faults.py tries more."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_faults():
    command = [sys.executable, "tests/faults.py", "--kills", "3", "--others", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for number, line in zip(("01", "02", "03", "04", "05"), lines, strict=True):
        assert line.startswith(f"stage {number}: 5 of 5 identical")
