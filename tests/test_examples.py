"""The examples run, and learn."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_plain_pytorch_learns_in_at_most_80_lines():
    path = EXAMPLES / "plain_pytorch.py"
    assert len(path.read_text().splitlines()) <= 80
    losses = runpy.run_path(str(path))["main"](steps=12, batch_size=8)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
