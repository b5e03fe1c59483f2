"""Files of people's corrections: a line of JSON each (``semwatch.streams.records.correction_line``), images beside it.

An image is sought by its path, as the drop folder has it, from the file's own folder or from images/ beside it; what a
path names must have the content that was corrected. The later word of one person replaces the earlier; where people
contradict each other, the file is refused with the lines.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch.streams import records
from semwatch.streams.records import Correction
from semwatch_training.data.datasets import DataSet, Sample
from semwatch_training.data.labels import canonical

SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    correction: Correction


def read_corrections(file: Path) -> DataSet:
    """Read a file of corrections as labelled boxes, all in the test part.

    A box that is no defect makes an image that is defect-free only where nothing else was said of the image.

    Raises:
        ConfigError: it cannot be read; a line is no correction; people contradict each other; an image is not there or
            has other content.
    """
    of_image: dict[str, list[_Line]] = {}
    for line in _holding(file, _lines(file)):
        if line.correction.page == 0:  # labelled images are first pages
            of_image.setdefault(line.correction.sha256, []).append(line)
    samples: list[Sample] = []
    for lines in of_image.values():
        image = _image_of(file, lines[0])
        defects = [line for line in lines if canonical(line.correction.label) != DEFECT_FREE]
        if not defects:
            samples.append(Sample(image, DEFECT_FREE))
        boxes = [line.correction.box_xyxy for line in defects]
        samples += [
            Sample(image, line.correction.label, line.correction.box_xyxy, (*boxes[:k], *boxes[k + 1 :]))
            for k, line in enumerate(defects)
        ]
    if not samples:
        raise ConfigError(f"{file}: no corrections; write one with `semwatch correct`, or name another file")
    return DataSet(file.resolve().parent.name, (), tuple(samples))


def _lines(file: Path) -> list[_Line]:
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); it must be lines of JSON in UTF-8") from error
    found = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            try:
                found.append(_Line(number, records.parsed_line(text)))
            except ValueError as error:
                raise ConfigError(
                    f"{file} line {number}: no correction ({error}); mend or take out the line"
                ) from error
    return found


def _holding(file: Path, lines: Sequence[_Line]) -> list[_Line]:
    """Of each defect the newest word of each person, once; refused where these are several."""
    of_defect: dict[str, dict[str, _Line]] = {}
    for line in sorted(lines, key=lambda line: line.correction.corrected_utc):
        of_defect.setdefault(line.correction.unknown_id, {})[line.correction.by] = line
    for by_person in of_defect.values():
        if len({canonical(line.correction.label) for line in by_person.values()}) > 1:
            one, other = sorted(by_person.values(), key=lambda line: line.number)[:2]
            raise ConfigError(
                f"{file} line {other.number}: {other.correction.by} says {other.correction.label!r}, and "
                f"{one.correction.by} says {one.correction.label!r} of the same defect in line {one.number}; agree, "
                f"and take one line out"
            )
    of_defects = of_defect.values()
    return [max(words.values(), key=lambda line: line.correction.corrected_utc) for words in of_defects]


def _image_of(file: Path, line: _Line) -> Path:
    name = PurePosixPath(line.correction.path)
    place = f"{file} line {line.number}"
    if name.is_absolute() or ".." in name.parts:
        raise ConfigError(f"{place}: {name} leads out of {file.parent}; write paths relative to it")
    for folder in (file.parent, file.parent / "images"):
        for path in (folder / name, folder / name.name):
            if path.is_file():
                if hashlib.sha256(decoding.read_file(path)).hexdigest() != line.correction.sha256:
                    raise ConfigError(f"{place}: {path} is not the image that was corrected; put that one there")
                return path
    raise ConfigError(f"{place}: {file.parent / name} does not exist; put the image there or take out the line")
