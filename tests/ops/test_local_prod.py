"""The small production holds all its claims."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.conftest import REPO


@pytest.mark.timeout(2700)  # three nights: eight minutes alone, twice that beside other tests
@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
)
def test_three_nights_with_a_fault_each_lose_and_double_nothing() -> None:
    script = [str(REPO / "tests/ops/run_local_prod.sh")]
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=2400)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it stops its servers
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-20000:]
    assert "the consumer never saw half a snapshot" in output
