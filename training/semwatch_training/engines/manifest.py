"""Whether an engine on disk is the one that is wanted, so that it need not be made again.

What lies where, and what a manifest says, see ``semwatch.triton.plans``: the daemon reads them too.
"""

from pathlib import Path

from semwatch.errors import ConfigError
from semwatch.triton import plans
from semwatch.triton.plans import Manifest

_OUTCOME = frozenset({"onnx_sha256", "plan_sha256", "plan_bytes", "seconds", "created_utc", "parity", "gpu"})


def up_to_date(out: Path, wanted: Manifest) -> Manifest | None:
    """The engine's manifest if it is there, whole, and made from the same; else None."""
    try:
        kept = plans.read(out / wanted.folder)
    except ConfigError:
        return None
    return kept if same_making(kept, wanted) else None


def same_making(one: Manifest, other: Manifest) -> bool:
    """Whether both say the same of what goes in; what came out may differ."""
    return one.model_dump(exclude=set(_OUTCOME)) == other.model_dump(exclude=set(_OUTCOME))
