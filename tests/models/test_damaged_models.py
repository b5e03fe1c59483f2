"""Damaged files of a model version: refused with the reason, what served before goes on. No damage ends anything."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import fuzzing
from semwatch.errors import ModelMismatch, ServiceUnavailable
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import META, PROBE, WEIGHTS
from semwatch.models.swap import NO_VERSION

SEED = 20261130
N_DAMAGES = int(os.environ.get("SEMWATCH_DAMAGES", "400"))
FILES = (META, PROBE, WEIGHTS, head_bank.BANK, head_bank.GOLDEN, choice.PINNED, "2.withdrawn")


@pytest.fixture
def repository(tmp_path: Path, tiny_repository: Path) -> Path:
    """With a second head beside the first, not yet in its place."""
    shutil.copytree(tiny_repository, tmp_path / "models")
    shutil.copytree(tmp_path / "models/head/1", tmp_path / "models/head/.2")
    return tmp_path / "models"


def place(repository: Path) -> None:
    (repository / "head/.2").rename(repository / "head/2")


def describe(repository: Path, **changes: object) -> None:
    meta = repository / "head/.2" / META
    meta.write_text(json.dumps({**json.loads(meta.read_text()), **changes}))


def no_meta(repository: Path) -> None:
    (repository / "head/.2" / META).unlink()


def half_meta(repository: Path) -> None:
    (repository / "head/.2" / META).write_text('{"schema')


def deep_meta(repository: Path) -> None:
    (repository / "head/.2" / META).write_text("[" * 100_000)


def other_weights(repository: Path) -> None:
    (repository / "head/.2" / WEIGHTS).write_bytes(b"x")


def pickled_probe(repository: Path) -> None:
    odd = np.array([object()], dtype=object)
    np.savez(repository / "head/.2" / PROBE, **{"input.features": odd}, allow_pickle=True)


def probe_of_text(repository: Path) -> None:
    arrays = dict(np.load(repository / "head/.2" / PROBE))
    name = next(name for name in arrays if name.startswith("output."))
    np.savez(repository / "head/.2" / PROBE, **{**arrays, name: np.full(arrays[name].shape, "text")})


def patched_probe(offset: int, value: int) -> Callable[[Path], None]:
    """Change a byte of every entry of the zip's directory."""

    def damage(repository: Path) -> None:
        path = repository / "head/.2" / PROBE
        data = bytearray(path.read_bytes())
        at = data.find(b"PK\x01\x02")
        while at >= 0:
            data[at + offset] = value
            at = data.find(b"PK\x01\x02", at + 4)
        path.write_bytes(data)

    return damage


def torn_stream(repository: Path) -> None:
    path = repository / "head/.2" / PROBE
    np.savez_compressed(path, **dict(np.load(path)))
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    data[201] ^= 255
    path.write_bytes(data)


def huge_shape(repository: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(
            "input.features.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234"
        )
    (repository / "head/.2" / PROBE).write_bytes(content.getvalue())


def fewer_labels(repository: Path) -> None:
    describe(repository, labels=["bridge"])


def more_labels(repository: Path) -> None:
    describe(repository, labels=["a", "b", "c", "d", "e"])


def same_labels(repository: Path) -> None:
    describe(repository, labels=["a", "a", "b"])


def odd_labels(repository: Path) -> None:
    describe(repository, labels=["\x1b[31m\n", "defect-free", "z" * 10_000])


def huge_code(repository: Path) -> None:
    describe(repository, codes={"bridge": 2**80})


def no_outputs(repository: Path) -> None:
    describe(repository, outputs={})


DAMAGES: list[Callable[[Path], None]] = [
    half_meta, deep_meta, other_weights, pickled_probe, probe_of_text, patched_probe(10, 99), patched_probe(8, 1),
    torn_stream, huge_shape, fewer_labels, more_labels, same_labels, odd_labels, huge_code, no_outputs,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_head_is_refused_at_a_swap_and_at_a_start(repository: Path, damage: Callable[[Path], None]) -> None:
    with Embedded(repository, threads=1) as models:
        damage(repository)
        place(repository)
        swap = models.refresh()
        assert swap is not None
        assert (swap.version, models.versions()["head"]) == (2, 1)
        assert swap.refused
        assert models.refresh() is None
    with Embedded(repository, threads=1) as models:
        assert models.versions()["head"] == 1
        assert list(models.refused()) == [2]


def version_that_is_no_number(repository: Path) -> None:
    (repository / "head/²").mkdir()
    (repository / "head/²" / META).write_text("{}")


def version_beyond_all_numbers(repository: Path) -> None:
    shutil.copytree(repository / "head/1", repository / "head" / ("9" * 200))


def version_without_meta(repository: Path) -> None:
    no_meta(repository)
    place(repository)


def pin_beyond_all_numbers(repository: Path) -> None:
    (repository / "head" / choice.PINNED).write_text("9" * 5000)


def pin_that_is_a_folder(repository: Path) -> None:
    (repository / "head" / choice.PINNED).mkdir()


def head_that_is_gone(repository: Path) -> None:
    (repository / "head").rename(repository / "elsewhere")


def head_that_is_a_file(repository: Path) -> None:
    head_that_is_gone(repository)
    (repository / "head").write_text("x")


@pytest.mark.parametrize(
    ("oddity", "is_said"),
    [
        (version_that_is_no_number, False),
        (version_beyond_all_numbers, False),
        (version_without_meta, False),
        (pin_beyond_all_numbers, True),
        (pin_that_is_a_folder, True),
        (head_that_is_gone, True),
        (head_that_is_a_file, True),
    ],
)
def test_odd_repository_changes_nothing_while_it_serves(
    repository: Path, oddity: Callable[[Path], None], is_said: bool
) -> None:
    with Embedded(repository, threads=1) as models:
        oddity(repository)
        swap = models.refresh()
        assert (swap is not None) == is_said
        assert swap is None or swap.version == NO_VERSION
        assert models.refresh() is None
        assert models.versions()["head"] == 1


@pytest.mark.parametrize("name", ["withdrawn", "pinned", "versions"])
def test_repository_that_is_away_for_a_while_changes_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def away(*_: object) -> None:
        raise ServiceUnavailable("the share is away")

    owner, function = {
        "withdrawn": (choice, "why_withdrawn"),
        "pinned": (choice, "pin_of"),
        "versions": (model_repository, "versions"),
    }[name]
    with Embedded(repository, threads=1) as models:
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, away)
            swap = models.refresh()
            assert swap is not None
            assert "the share is away" in (swap.refused or "")
            assert models.refresh() is None
        place(repository)
        swap = models.refresh()
        assert swap is not None
        assert (swap.version, swap.refused) == (2, None)


def test_share_that_gives_errors_is_away_and_not_empty(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: _raise(OSError(5, "EIO")) if self.name == "head" else real(self))
    with pytest.raises(ServiceUnavailable, match="cannot be read now"):
        model_repository.versions(repository, "head")


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("model", ["detector", "encoder"])
def test_damaged_detector_or_encoder_leaves_the_one_before_in_service(repository: Path, model: str) -> None:
    shutil.copytree(repository / model / "1", repository / model / "2")
    (repository / model / "2" / PROBE).write_bytes(b"PK\x05\x06 torn")
    with Embedded(repository, threads=1) as models:
        assert models.versions()[model] == 1
    choice.pin(repository, model, 2)
    with pytest.raises(ModelMismatch, match="cannot be used"):
        Embedded(repository, threads=1)


def test_damaged_files_beside_the_weights_are_read_or_refused() -> None:
    tried = fuzzing.models(200, SEED)
    assert tried.n_read > 0
    assert tried.n_refused > 50


def test_random_damage_of_any_file_is_refused_or_harmless(repository: Path) -> None:
    """A version is taken only if its files say what they said; whatever is wrong, it is one of our errors."""
    rng = random.Random(SEED)
    originals = {name: (repository / "head/.2" / name) for name in FILES[:5]}
    contents = {name: path.read_bytes() for name, path in originals.items() if path.exists()}
    contents |= {choice.PINNED: b"1\n", "2.withdrawn": b"because\n"}
    place(repository)
    n_refused = 0
    with Embedded(repository, threads=1) as models:
        for _ in range(N_DAMAGES):
            name = rng.choice(sorted(contents))
            folder = repository / "head" if name in (choice.PINNED, "2.withdrawn") else repository / "head/2"
            (folder / name).write_bytes(_damaged(rng, contents[name]))
            try:
                choice.to_try(repository, "head")
                models._swaps._fitting("head", 2, lambda version: models._load("head", version), models._check_beside)
                head_bank.read(repository / "head/2" / head_bank.BANK)
            except (ModelMismatch, ServiceUnavailable):
                n_refused += 1
            if folder.name == "head":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(contents[name])
    assert n_refused > N_DAMAGES / 4


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """Flip bits, cut, double, or put in bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(5):
            case 0 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at : at + rng.choice([1, 10, 1000])]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice([1, 10]))
            case 4:
                changed[at:at] = changed[at : at + 50]
    return bytes(changed[: rng.randrange(len(changed) + 1)]) if rng.random() < 0.1 else bytes(changed)
