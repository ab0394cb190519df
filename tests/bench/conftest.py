"""`bench` is no installed package: it is found from the repository's root, however pytest is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
