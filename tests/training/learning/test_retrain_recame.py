"""A site whose head is of ReCAME-Net's family learns with heads of that family."""

import pytest

from commands import Command, in_process
from cycles import add_two
from learning_site import Lab
from semwatch_training import __main__ as command_line
from semwatch_training.learning.refit import refit
from semwatch_training.learning.retrain import run_cycle
from semwatch_training.publishing.head_families import family_of


@pytest.mark.slow
def test_cycle_fits_a_head_of_the_family_that_serves(lab: Lab) -> None:
    assert refit(lab.repository, family="recame").version == 2
    assert family_of(lab.meta) == "recame"
    add_two(lab)
    outcome = run_cycle(lab.site)
    assert outcome.status == "learned", outcome.sentence
    assert outcome.head_version == 3
    assert family_of(lab.meta) == "recame"
    assert lab.labels == ("bridge", "defect-free", "novel-1", "novel-2", "particle")


def test_refit_asks_for_something_to_change(lab: Lab, capsys, monkeypatch) -> None:
    import commands

    monkeypatch.setattr(commands, "main", command_line.main)
    train: Command = in_process(capsys, monkeypatch)
    result = train("refit", "--repository", lab.repository)
    assert result.code == 2
    assert "--family" in result.err
