"""A head of ReCAME-Net's family on a real Triton: it takes over, answers as the embedded runtime, and is taken back."""

from pathlib import Path

import numpy as np
import torch

from semwatch.models import choice
from semwatch.models.inference import Embedded
from semwatch.triton.client import Triton
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.families.recame.classifier import Recame
from semwatch_training.families.recame.fit_recame import Schedule
from semwatch_training.families.recame.network import RecameForm, Regions
from semwatch_training.publishing.export import publish_head
from tiny_models import blobs, exporting_once
from triton_server import WIDTH, first_swap, rows

PLAIN, REGIONS = WIDTH - 16, Regions(2, 2)


def test_it_takes_over_answers_alike_and_is_taken_back(models: Triton, repository: Path, exports: Path) -> None:
    samples = blobs(WIDTH)
    classify = Recame(REGIONS, RecameForm(experts=2, width=16), Schedule(epochs=20, batch=16))
    head = fit_head(samples.features, samples.labels, HeadFit(frozen_width=PLAIN, components=8), classify=classify)
    with exporting_once(exports):
        assert publish_head(head, repository, encoder_version=1, provenance={}, bank=samples, golden=samples) == 2
    swap = first_swap(models)
    assert swap is not None
    with Embedded(repository, models=("encoder", "head"), threads=1) as embedded:
        for n in (1, 17):
            ours, theirs = models.infer("head", rows(n)), embedded.infer("head", rows(n))
            assert (ours.version, theirs.version) == (2, 2)
            with torch.no_grad():
                expected = head.eval()(torch.from_numpy(rows(n)["features"]))
            for name, torchs in zip(("logits", "p_values"), expected, strict=True):
                worst = np.abs(torchs.numpy()).max()
                np.testing.assert_allclose(ours.outputs[name], theirs.outputs[name], rtol=0, atol=1e-4 * worst)
                np.testing.assert_allclose(ours.outputs[name], torchs.numpy(), rtol=0, atol=1e-3 * worst)
    choice.withdraw(repository, "head", 2, "it was worse")
    assert first_swap(models) is not None
    assert models.infer("head", rows(2)).version == 1
