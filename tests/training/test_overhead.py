"""The fast form of the bar ``loop overhead``; a lower bound than the bar's own, because few steps are timed."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_loop_costs_little_beside_its_network(root: Path, data_folder: Path) -> None:
    command = [sys.executable, str(root / "tests/bars/loop_overhead.py"), "steps=32", "only=digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"items/s: ([\d.]+)%", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) >= 80, done.stdout
