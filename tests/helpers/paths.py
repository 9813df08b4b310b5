"""The folders of the repository that tests read."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
MPLUG = str(Path(sys.executable).with_name("mplug"))
