"""What a command takes where nothing else is said; apart from what runs, so that `--help` loads no torch."""

from pathlib import Path
from typing import Literal

SHIPPED = Path(__file__).parents[1] / "weights"
"""Weights that come with the package."""
SHIPPED_DETECTOR = SHIPPED / "detector.safetensors"
MIN_NORMALS = 8
"""Normal images that a detector is trained on at least."""
BRANCH_STEPS, BRANCH_WIDTH = 3000, 64
"""Of the default detector's branch: steps of its training, and its channels."""
HeadFamily = Literal["linear", "recame"]
"""Of a head's logits: a logistic regression, or ReCAME-Net's student for classes of a long tail."""
HEAD_IMAGES = 720
"""Synthetic images that are searched for the default head's crops."""
CROP_IMAGES = 720
"""Images that are searched for crops to teach the encoder with."""
ENGINE_IMAGES = 8
"""Images that a conversion is proved on."""
