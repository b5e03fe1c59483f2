"""Procedural SEM review micrographs with ground truth: no fab data needed to train, to test or to show.

layout, geometry    what is drawn: metal, films, gate arrays, or a user's own layout
specimen            how it is printed: layers of coverage, height and gray
shapes, defects     what goes wrong with it: fifteen types
imaging             what the microscope makes of it
rendering           one micrograph with masks
pairs               an inspected field and its reference
info_bar, klarf, lot   a whole lot as files
"""

from semwatch_training.synthetic.defects import DEFECT_TYPES, STAGES
from semwatch_training.synthetic.lot import LotImage, LotManifest, lot_images, write_image, write_lot
from semwatch_training.synthetic.pairs import Pair, render_pair
from semwatch_training.synthetic.rendering import SyntheticMicrograph, render

__all__ = [
    "DEFECT_TYPES",
    "STAGES",
    "LotImage",
    "LotManifest",
    "Pair",
    "SyntheticMicrograph",
    "lot_images",
    "render",
    "render_pair",
    "write_image",
    "write_lot",
]
