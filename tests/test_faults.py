"""Each stage is stopped a few times and started again (slow): python tests/faults.py tries more."""

import pytest
from conftest import run


@pytest.mark.slow
def test_faults():
    lines = run(["tests/faults.py", "--kills", "3", "--others", "1"]).splitlines()
    for number, line in zip(("01", "02", "03", "04", "05"), lines, strict=True):
        assert line.startswith(f"stage {number}: 5 of 5 identical")
