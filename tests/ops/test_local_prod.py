"""The small production holds all its claims."""

import shutil
import subprocess

import pytest

from tests.conftest import REPO


@pytest.mark.timeout(900)  # three nights, alone in five minutes
@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
)
def test_three_nights_with_a_fault_each_lose_and_double_nothing() -> None:
    script = [REPO / "tests/ops/run_local_prod.sh"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=880, check=False)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-3000:]
    assert "the consumer never saw half a snapshot" in ran.stdout
