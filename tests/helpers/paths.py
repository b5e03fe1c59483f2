"""Where the checkout lies, and the public images beside it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
DATA = Path(os.environ.get("SEMWATCH_DATA", ROOT.parent / "shared" / "data"))
"""Public images; tests that need them skip where they are absent."""
