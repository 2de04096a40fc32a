"""Analyses are tested on the tiny encoders and class folders of tests/tasks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tasks"))
