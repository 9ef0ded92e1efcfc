"""The benchmarks are scripts beside the package: their folders, and that of run_pretraining.py, come on the path."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
for folder in (REPOSITORY, REPOSITORY / "benchmarks", REPOSITORY / "benchmarks" / "learning"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
