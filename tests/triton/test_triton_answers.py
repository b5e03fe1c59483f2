"""A real Triton with tiny networks answers as the embedded runtime does, also while the head changes."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from semwatch.errors import ModelMismatch, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.models.inference import Embedded
from semwatch.models.swap import Swap
from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from triton_line import backend_with_faults
from triton_server import crops, images, publish_four_classes, publish_noise, republish, rows, running

# --- the same answers ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_embedded_runtime(shared: tuple[str, Path]) -> None:
    url, repository = shared
    asked = [("detector", images(3)), ("encoder", crops(5)), ("head", rows(7)), ("detector", images(1))]
    with Triton(repository, url=url) as triton, Embedded(repository, threads=1) as embedded:
        assert triton.versions() == embedded.versions() == {"detector": 1, "encoder": 1, "head": 1}
        for model, inputs in asked:
            ours, theirs = triton.infer(model, inputs), embedded.infer(model, inputs)
            assert (ours.version, ours.meta) == (theirs.version, theirs.meta)
            assert ours.outputs.keys() == theirs.outputs.keys()
            for name, values in theirs.outputs.items():
                assert ours.outputs[name].dtype == values.dtype
                np.testing.assert_allclose(ours.outputs[name], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [0, 16, 17, 40])
def test_batch_of_any_size_is_answered(shared: tuple[str, Path], n: int) -> None:
    url, repository = shared
    with Triton(repository, url=url) as triton, Embedded(repository, threads=1) as embedded:
        ours = triton.infer("detector", images(n)).outputs
        assert ours["score_map"].shape == (n, 8, 8)
        assert ours["raw_score"].shape == (n,)
        if n:
            np.testing.assert_allclose(
                ours["raw_score"], embedded.infer("detector", images(n)).outputs["raw_score"], rtol=0, atol=1e-4
            )


def test_wrong_arrays_are_refused_before_they_are_sent(shared: tuple[str, Path]) -> None:
    url, repository = shared
    with Triton(repository, url=url) as triton, pytest.raises(ModelMismatch, match="the detector wants"):
        triton.infer("detector", {"image": np.zeros((1, 112, 112), np.float32)})


def test_threads_of_live_work_and_backlog_get_their_own_answers(shared: tuple[str, Path]) -> None:
    url, repository = shared
    with Triton(repository, url=url) as triton:
        expected = [float(triton.infer("detector", images(1, seed)).outputs["raw_score"][0]) for seed in range(8)]
        found: dict[int, float] = {}

        def ask(seed: int) -> None:
            for _ in range(5):
                answer = triton.infer("detector", images(1, seed), backlog=seed % 2 == 0)
                found[seed] = float(answer.outputs["raw_score"][0])

        workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
    np.testing.assert_allclose([found[seed] for seed in range(8)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_backlog", [False, True])
def test_live_request_passes_the_backlog_that_waits(
    installed: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, is_backlog: bool
) -> None:
    monkeypatch.setattr("semwatch.triton.client.BACKLOG_TIMEOUT_S", 30.0)
    answered: list[str] = []
    with (
        backend_with_faults(repository.parent),
        running(installed, repository) as server,
        Triton(repository, url=server.url) as models,
    ):
        (repository.parent / "fault").write_text("slow 0.1")

        def ask(name: str, backlog: bool) -> None:
            models.infer("detector", images(1), backlog=backlog)  # one after the other; heads' are put together
            answered.append(name)

        askers = [threading.Thread(target=ask, args=("old", True)) for _ in range(12)]
        askers.append(threading.Thread(target=ask, args=("new", is_backlog)))
        for asker in askers:
            asker.start()
            time.sleep(0.01)
        for asker in askers:
            asker.join(40)
    place = answered.index("new")
    assert len(answered) == 13
    print(f"\nplace of the request that came last: {place + 1} of 13")
    assert place <= 4 if not is_backlog else place == 12


def test_backlog_gives_up_sooner_than_live_work(
    lent: tuple[LocalTriton, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, repository = lent
    monkeypatch.setattr("semwatch.triton.client.BACKLOG_TIMEOUT_S", 0.5)
    with Triton(repository, url=server.url, timeout_s=20) as models:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable):
            models.infer("head", rows(), backlog=True)
        assert time.monotonic() - start < 1.5
        os.kill(server.pid, signal.SIGCONT)


def test_repository_is_not_touched(shared: tuple[str, Path], tiny_repository: Path) -> None:
    _, repository = shared
    files = {path.relative_to(repository): path.stat().st_size for path in repository.rglob("*") if path.is_file()}
    expected = {p.relative_to(tiny_repository): p.stat().st_size for p in tiny_repository.rglob("*") if p.is_file()}
    assert files == expected


# --- the swap --------------------------------------------------------------------------------------------------------


def test_heads_change_under_four_clients_without_a_failure_and_with_their_own_labels(
    models: Triton, repository: Path
) -> None:
    wrong: list[object] = []
    seen: set[int] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = models.infer("head", rows(3))
                seen.add(answer.version)
                if answer.version > 1 and not answer.meta.labels[0].startswith(f"v{answer.version} "):
                    wrong.append((answer.version, answer.meta.labels))
            except Exception as error:  # noqa: BLE001 - any failure is what the test looks for
                wrong.append(error)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        plain = model_repository.read_meta(repository, "head", 1).labels
        for version in range(2, 6):
            assert republish(repository, labels=tuple(f"v{version} {label}" for label in plain)) == version
            assert models.refresh() == Swap("head", version)
            assert models.refresh() is None
            deadline = time.monotonic() + 5
            while version not in seen and time.monotonic() < deadline:
                time.sleep(0.01)
        choice.roll_back(repository, "head", "worse")
        assert models.refresh() == Swap("head", 4)
    finally:
        stop.set()
        for client in clients:
            client.join(timeout=10)
    assert wrong == []
    assert seen == {1, 2, 3, 4, 5}


def test_head_with_one_class_more_takes_over(models: Triton, repository: Path) -> None:
    assert models.infer("head", rows()).outputs["logits"].shape == (1, 3)
    version = publish_four_classes(repository)
    assert models.refresh() == Swap("head", version)
    answer = models.infer("head", rows(2))
    np.testing.assert_allclose(answer.outputs["logits"], rows(2)["features"][:, :4], atol=1e-5)
    assert answer.meta.labels == ("a", "b", "c", "d")


def test_broken_head_is_refused_once_and_the_old_one_goes_on(
    models: Triton, repository: Path, server: LocalTriton
) -> None:
    broken = publish_noise(repository)
    swap = models.refresh()
    assert swap is not None
    assert "does not load" in (swap.refused or "")
    assert models.refresh() is None
    assert set(models.refused()) == {broken}
    assert models.infer("head", rows()).version == 1
    choice.withdraw(repository, "head", broken, "broken")
    server.stop(timeout_s=0.05)
    server.start()  # what was refused does not come back with the server
    assert models.infer("head", rows()).version == 1
    meta = model_repository.read_meta(repository, "head", 1)
    good = model_repository.publish(repository, meta, repository / "head/1/model.onnx")
    assert models.refresh() == Swap("head", good)


def test_head_that_answers_its_probe_otherwise_never_answers_the_line(models: Triton, repository: Path) -> None:
    probe = model_repository.read_probe(repository, "head", 1)
    assert probe is not None
    version = republish(repository)
    lying = {**probe[1], "logits": probe[1]["logits"] * 1.01}
    model_repository.write_probe(repository / "head" / str(version) / model_repository.PROBE, probe[0], lying)
    swap = models.refresh()
    assert swap is not None
    assert "answers its probe with another logits" in (swap.refused or "")
    assert models.infer("head", rows()).version == 1


def test_start_after_a_broken_publication_serves_the_head_before_it(server: LocalTriton, repository: Path) -> None:
    broken = publish_noise(repository)
    with Triton(repository, url=server.url) as models:
        assert models.versions()["head"] == 1
        assert set(models.refused()) == {broken}
    choice.pin(repository, "head", broken)
    with pytest.raises(ModelMismatch, match="does not load"):
        Triton(repository, url=server.url)


def test_recipes_with_different_pins_are_served_side_by_side(server: LocalTriton, repository: Path) -> None:
    republish(repository)
    with (
        Triton(repository, url=server.url, pins={"head": 1}) as pinned,
        Triton(repository, url=server.url) as floating,
    ):
        for version in (3, 4):  # version 1 has to make room for the last, and is asked for again
            assert republish(repository) == version
            assert floating.refresh() == Swap("head", version)
            assert pinned.refresh() is None
            assert floating.infer("head", rows()).version == version
            assert pinned.infer("head", rows()).version == 1
