"""Whole cycles on a site of tiny models: what goes in, how one is disturbed or dies, and how all is at its end."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from learning_site import RECIPE, Lab
from semwatch.models import head_bank, model_repository
from semwatch_training.learning.retrain import run_cycle

KNOWN = ("bridge", "defect-free", "particle")
LARGE, SMALL = 5, 6
"""Axes of the two unseen classes; 24 and 20 crops come as novel-1 and novel-2."""
N = 44
STRICT = {
    **RECIPE,
    "unknown": {"significance": 0.4, "dismiss_probability": 0.5},
    "promotion": {"max_unknown_rate": 0.05},
}


class Crash(BaseException):
    """The process dies here, as far as one can without dying."""


def add_two(lab: Lab) -> None:
    """24 and 20 crops of two classes that the head has never seen."""
    lab.add([*lab.blob(LARGE, 24), *lab.blob(SMALL, 20)])


def after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object], *, call: int = 1) -> None:
    """Act once, after the given call of a function."""
    real, n = getattr(owner, name), iter(range(1, 1_000_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = real(*args, **kwargs)
        if next(n) == call:
            act()
        return answer

    monkeypatch.setattr(owner, name, wrapped)


def crash() -> None:
    raise Crash


def cycle_dies(lab: Lab, patch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int = 1) -> None:
    """Run a cycle that dies after the given call of a function."""
    with patch.context() as during:
        after(during, owner, name, crash, call=call)
        with pytest.raises(Crash):
            run_cycle(lab.site)


def assert_learned(lab: Lab, n_versions: int = 2) -> None:
    """Everything is as one undisturbed cycle over the two classes leaves it, however often it was interrupted."""
    assert lab.versions() == list(range(1, n_versions + 1))
    assert lab.labels == ("bridge", "defect-free", "novel-1", "novel-2", "particle")
    assert len(lab.learned_ids()) == len(set(lab.learned_ids())) == N
    assert (len(lab.learned_ids("novel-1")), len(lab.learned_ids("novel-2"))) == (24, 20)
    assert lab.n_waiting() == 0
    assert lab.states() == {"learned": N}
    assert lab.clusters() == {"novel-1": ("learned", "novel-1"), "novel-2": ("learned", "novel-2")}
    (line,) = lab.audit_lines()
    assert json.loads(line)["learned"] == "novel-1 (24 crops), novel-2 (20 crops)"


def republish(lab: Lab, **changes: Any) -> int:
    """The head in service once more under the next number, with another description."""
    folder = lab.repository / "head" / str(lab.version)
    beside = {name: folder / name for name in (model_repository.PROBE, head_bank.BANK, head_bank.GOLDEN)}
    return model_repository.publish(
        lab.repository, lab.meta.model_copy(update=changes), folder / "model.onnx", beside=beside
    )
