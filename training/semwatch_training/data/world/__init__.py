"""Scenes of no process in particular: many layouts, imaged by many microscopes, normal or with one true defect.

May import: the noise and shapes of `data.pseudo_defects`, and `data.pattern_defects`.
Start reading: `twins.py`.
"""

from semwatch_training.data.world.defects import DEFECTS
from semwatch_training.data.world.layouts import LAYOUTS
from semwatch_training.data.world.twins import Scene, scene, scenes

__all__ = ["DEFECTS", "LAYOUTS", "Scene", "scene", "scenes"]
