"""What the default detector learns from, as plain numbers: a command may say it without loading torch."""

from dataclasses import dataclass
from pathlib import Path

from semwatch_training.synthetic import STAGES


@dataclass(frozen=True, slots=True)
class BranchImages:
    """What the default detector learns from: synthetic images, or a folder of normal ones."""

    normals: Path | None = None
    """Folder; None for synthetic fields."""
    n_normals: int = 200
    """Synthetic normal fields; of a folder all count that are not held out."""
    n_labelled: int = 1800
    """Synthetic fields with a labelled defect; none beside a folder, whose defects nobody has labelled."""
    n_backgrounds: int = 200
    """Procedural backgrounds of no process."""
    n_scenes: int = 1600
    """Scenes of no process, half of them with a true defect; none beside a folder. See ``data.world``."""
    held_out: int = 200
    """Normal images kept for the gate's threshold; of a folder at most a quarter."""
    stages: tuple[str, ...] = STAGES

    @property
    def n(self) -> int:
        """Pairs of image and mask that ``views`` makes of them."""
        return 2 * (self.n_normals + self.n_backgrounds) + self.n_labelled + self.n_scenes
