"""Studies are tested with what tests/tasks knows of commands."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tasks"))
