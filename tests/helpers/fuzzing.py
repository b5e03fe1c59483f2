"""Damaged inputs of every kind that comes from outside, in seeded runs: read, or refused with one of our errors.

Any other exception and a reader that hangs end a run. ``make fuzz`` runs every kind for a while:

    python tests/helpers/fuzzing.py SECONDS [KIND ...]
"""

import io
import json
import math
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from damage import damaged
from factories import make_review, make_verdict, result_summary
from image_files import GRAY, VALID
from semwatch.errors import ConfigError, ImageError, ModelMismatch
from semwatch.intake.decoders import Decoders
from semwatch.models import crop_store, head_bank, model_repository
from semwatch.models.crop_store import KeptCrop
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import META, PROBE
from semwatch.settings.fields import EXAMPLES
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import load_site
from semwatch.streams.records import RESULTS, UNKNOWNS, Fields, decode, decode_result, encode, fault_of, records


class Tried(NamedTuple):
    """What came of a run; whatever else happens raises."""

    n_read: int
    n_refused: int
    n_ended: int = 0
    """Of the refused: those that ended a decoder."""


# --- images ----------------------------------------------------------------------------------------------------------

MAX_PX = 1 << 20


def images(n: int, seed: int) -> Tried:
    """Decode damaged files in the pool of decoders; after them, a sound one is decoded as ever."""
    dice, files = random.Random(seed), sorted(VALID.values())
    n_read = n_ended = 0
    with Decoders(1, cpu_s=10, max_pixels=MAX_PX) as decoders:
        for _ in range(n):
            data = damaged(dice.choice(files), dice, files)
            try:
                pages = decoders.decode(data, name="x", max_pixels=MAX_PX)
            except ImageError as error:
                n_ended += "the decoder" in str(error)
                continue
            n_read += 1
            for page in pages:
                x0, y0, x1, y1 = page.field_xyxy
                H, W = page.pixels.shape
                assert page.pixels.dtype == np.uint8
                assert 0 <= x0 < x1 <= W
                assert 0 <= y0 < y1 <= H
                assert H * W <= MAX_PX
                assert page.pixel_nm is None or page.pixel_nm > 0
        assert np.array_equal(decoders.decode(VALID["png"], name="x")[0].pixels, GRAY)
    return Tried(n_read, n - n_read, n_ended)


# --- stream entries --------------------------------------------------------------------------------------------------

_REVIEW = make_review(1, verdicts=[make_verdict("unknown")])
SOUND = {UNKNOWNS: encode(records(_REVIEW)[0]), RESULTS: result_summary(_REVIEW)}
_READERS: dict[str, Callable[[Fields], Any]] = {UNKNOWNS: decode, RESULTS: decode_result}
_ODD: tuple[Any, ...] = (
    None, True, -1, 2**31, 2**70, 1e308, float("inf"), float("nan"), "", "x" * 300, "\ud800", "\x00",
    [], {}, [[[]]], [1e400], {"a": {"b": {}}}, "1e999",
)  # fmt: skip


def entries(n: int, seed: int) -> Tried:
    """Read spoiled entries of both streams."""
    dice, n_sound = random.Random(seed), 0
    for _ in range(n):
        stream = dice.choice([UNKNOWNS, RESULTS])
        fields = _spoiled(SOUND[stream], dice)
        fault = fault_of(stream, fields)
        if fault is not None:
            assert fault
            continue
        n_sound += 1
        found = _READERS[stream](fields)
        json.dumps(json.loads(fields[b"meta"]), allow_nan=False).encode()
        if stream == UNKNOWNS:
            assert all(math.isfinite(x) for x in (found.image_score, found.peak_score))
            assert np.isfinite(found.features).all()
            assert found.crop.shape[0] == found.crop.shape[1] <= 1024
    return Tried(n_sound, n - n_sound)


def _spoiled(fields: Fields, dice: random.Random) -> Fields:
    """Damage the bytes of a field, or put an odd value for a key of ``meta``."""
    spoilt = dict(fields)
    if dice.random() < 0.5:
        name = dice.choice(sorted(spoilt))
        spoilt[name] = damaged(spoilt[name] or b"\0", dice, list(fields.values()))
    else:
        meta = json.loads(spoilt[b"meta"])
        meta[dice.choice(sorted(meta))] = dice.choice(_ODD)
        spoilt[b"meta"] = json.dumps(meta).encode()
    if dice.random() < 0.1:
        del spoilt[dice.choice(sorted(spoilt))]
    return spoilt


# --- settings --------------------------------------------------------------------------------------------------------

_SETTINGS: dict[Path, Callable[[Path], object]] = {
    EXAMPLES / "site.yaml": load_site,
    EXAMPLES / "recipe.yaml": load_recipe,
}
_WORDS = (
    b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"[" * 50, b"{" * 50, b"\t", b"---\n", b"\x00", b"\xff",
    b"null", b"~", b"0x10", b"1e999", b".nan", b"-.inf", b"1_0", b"yes", b"2026-01-01", b"? ", b"- ", b"|", b">",
    b"%YAML 9", b"9" * 5000, b"'", b'"', b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\\", b": ", b"\n", b"\r", b"#",
)  # fmt: skip


def settings(n: int, seed: int) -> Tried:
    """Load damaged site and recipe files; what is refused names the file."""
    dice, n_read = random.Random(seed), 0
    texts = [path.read_bytes() for path in _SETTINGS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        for _ in range(n):
            text, load = dice.choice(list(zip(texts, _SETTINGS.values(), strict=True)))
            path.write_bytes(_garbled(text, dice, texts))
            try:
                load(path)
                n_read += 1
            except ConfigError as error:
                refusal = str(error)
                if not refusal.startswith(str(path)):
                    raise AssertionError(f"a refusal that names no file: {refusal}") from error
    return Tried(n_read, n - n_read)


def _garbled(text: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """Damage bytes, or put words of YAML into one to three places, move lines, and double them."""
    if dice.random() < 0.3:
        return damaged(text, dice, others)
    lines = text.splitlines(keepends=True)
    for _ in range(dice.randint(1, 3)):
        at, kind = dice.randrange(len(lines)), dice.randrange(4)
        if kind == 0:
            lines[at] = dice.choice([b"", lines[at] * 2, b"  " + lines[at], lines[at].lstrip()])
        elif kind == 1:
            lines.insert(at, dice.choice(lines))
        elif kind == 2:
            key, colon, _ = lines[at].partition(b": ")
            lines[at] = key + colon + dice.choice(_WORDS) + b"\n"
        else:
            where = dice.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:where] + dice.choice(_WORDS) + lines[at][where:]
    return b"".join(lines)


# --- files of the model repository ------------------------------------------------------------------------------------


def models(n: int, seed: int) -> Tried:
    """Read damaged meta.json, probes, banks and shards of crops; no weights, whose hash would differ."""
    dice, n_read = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        version = repository / "head" / "1"
        version.mkdir(parents=True)
        readers: dict[str, Callable[[], object]] = {
            META: lambda: model_repository.read_meta(repository, "head", 1),
            PROBE: lambda: model_repository.read_probe(repository, "head", 1),
            head_bank.BANK: lambda: head_bank.read(version / head_bank.BANK),
            "crops.npz": lambda: crop_store.decode((version / "crops.npz").read_bytes()),
        }
        sound = _model_files(version)
        for _ in range(n):
            name = dice.choice(sorted(readers))
            (version / name).write_bytes(_damaged_inside(sound[name], dice, sorted(sound.values())))
            try:
                readers[name]()
            except ModelMismatch:
                continue
            n_read += 1
    return Tried(n_read, n - n_read)


def _damaged_inside(data: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """Damage a file as a whole, or an array or a value in it, so that its checksums still hold."""
    if dice.random() < 0.3:
        return damaged(data, dice, others)
    if data.startswith(b"{"):
        meta = json.loads(data)
        meta[dice.choice(sorted(meta))] = dice.choice(_ODD)
        return json.dumps(meta).encode()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    hit, other = dice.choice(sorted(members)), dice.choice(sorted(members))
    if dice.random() < 0.2:
        members[hit] = members[other]
    elif dice.random() < 0.1:
        del members[hit]
    else:
        members[hit] = damaged(members[hit], dice, sorted(members.values()))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


def _model_files(version: Path) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 8)).astype(np.float32)
    labels = ("bridge", "particle", "void") * 2
    meta = model_repository.Meta(
        model="head",
        created_utc="2026-01-01T00:00:00Z",
        weights_sha256="ab" * 32,
        inputs={"features": model_repository.Tensor(dtype="float32", shape=(8,))},
        outputs={"probabilities": model_repository.Tensor(dtype="float32", shape=(3,))},
        labels=labels[:3],
        codes={"bridge": 7},
        provenance={"seed": 1, "form": "head"},
    )
    model_repository.write_probe(version / PROBE, {"features": features}, {"probabilities": features[:, :3]})
    head_bank.write(Bank(features, labels, tuple("abcdef"), ("",) * 6), version / head_bank.BANK)
    crops = [KeptCrop(GRAY[:40, :40], features[:4, :4], features[0, :2], None) for _ in range(3)]
    return {
        META: meta.model_dump_json().encode(),
        PROBE: (version / PROBE).read_bytes(),
        head_bank.BANK: (version / head_bank.BANK).read_bytes(),
        "crops.npz": crop_store.encode(crops),
    }


# --- for a while -----------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[int, int], Tried], int]] = {
    "images": (images, 500),
    "entries": (entries, 1000),
    "settings": (settings, 200),
    "models": (models, 500),
}
"""By name, what tries a kind, and how many cases it tries with one seed."""


def main(seconds: float, *kinds: str) -> None:
    """Try every kind for a while, and print how many cases there were; an escape ends it with the seed."""
    for kind in kinds or KINDS:
        tries, n = KINDS[kind]
        end, seed, found = time.monotonic() + seconds, 0, []
        while time.monotonic() < end:
            seed += 1
            try:
                found.append(tries(n, seed))
            except BaseException:
                print(f"{kind}: escaped with seed {seed}, {n} cases")
                raise
        read, refused, ended = (sum(column) for column in zip(*found, strict=True))
        cases = f"{read + refused} cases, seeds 1 to {seed}"
        print(f"{kind}: {cases}: {read} read, {refused} refused, {ended} of them ended a decoder", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
