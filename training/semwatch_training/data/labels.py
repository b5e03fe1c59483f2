"""Words of people for what an image shows: which labels mean that nothing is wrong."""

import re

from semwatch.defects import DEFECT_FREE

NORMAL_NAMES = (
    DEFECT_FREE, "defectfree", "good", "normal", "ok", "clean", "free", "pass", "none", "nodefect", "no-defect",
    "non-defective", "negative",
)  # fmt: skip
NORMAL_BEGINNINGS = ("clean-", "good-", "normal-", "ok-", "defect-free-", "no-defect-")


def is_normal(label: str) -> bool:
    """Whether a label, or the name of a folder, says that an image shows no defect.

    >>> [is_normal(name) for name in ("good", "CLEAN_LAYER", "Defect Free", "open", "freeform")]
    [True, True, True, False, False]
    """
    name = re.sub(r"[\s_-]+", "-", label.strip().lower())
    return name in NORMAL_NAMES or name.startswith(NORMAL_BEGINNINGS)


def canonical(label: str) -> str:
    """The label as it counts: every word for defect-free is one class.

    >>> canonical("good"), canonical(" void ")
    ('defect-free', 'void')
    """
    return DEFECT_FREE if is_normal(label) else label.strip()
