"""Kinds of values that settings have: names, paths, addresses, shares, each checked and refused with a remedy.

``Settings`` is the base of every section: unknown keys are refused, values are frozen, and an empty section means all
defaults.
"""

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from semwatch.settings.yaml_file import BLANK

EXAMPLES = Path(__file__).with_name("examples")
"""Folder of the commented examples, valid as they stand: ``site.yaml``, ``recipe.yaml``."""

T = TypeVar("T")


def refusal(text: str, **values: object) -> PydanticCustomError:
    """A fault of a value, worded as what to do; ``{name}`` in the text stands for one of the values."""
    return PydanticCustomError("refused", text, values)


def _absolute(value: object, info: ValidationInfo) -> Path:
    if value is None or value is BLANK:
        raise refusal("is empty: give a path")
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise refusal("must be a path of printable characters: put it in quotes")
    if value.startswith("~") or re.search(r"\$\{|(^|/)\$", value):
        raise refusal("'~' and '$NAME' are not expanded: write the whole path")
    folder = (info.context or {}).get("folder")
    return Path(value) if folder is None else Path(os.path.normpath(Path(folder).absolute() / value))


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", value):
        raise refusal(
            "must be 1 to 64 of the characters A-Z a-z 0-9 _ . - and start with a letter, a digit or _ "
            "(it becomes part of file and metric names)"
        )
    return value


def _name_pattern(value: str) -> str:
    if value.count("*") != 1 or "/" in value or not value.isprintable() or re.search(r"[?\[\]]", value):
        raise refusal("must be a file name without its extension, with one * for what both names share, such as *_ref")
    return value


def _file_patterns(value: str) -> str:
    patterns = value.split("|")
    if any(not one.strip("*?.") or "/" in one or "\\" in one or not one.isprintable() for one in patterns):
        raise refusal('must be patterns of file names with | between, such as "*.klarf|*.001"')
    return value


def _image_type(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _suffix(value: str) -> str:
    if not re.fullmatch(r"\.[^\s/\\*?]+", value):
        raise refusal("must be the end of a file name with its dot, such as .tif")
    return value


def _label(value: str) -> str:
    if value in ("unknown", "non-decidable"):
        raise refusal("is a verdict, not a class: give its code as {key}", key=value.replace("-", "_") + "_code")
    if not value.isprintable() or value.strip() != value or not 1 <= len(value) <= 64:
        raise refusal("must be a class name of 1 to 64 printable characters without spaces around it")
    return value


def _redis_url(value: str) -> str:
    # Whatever is wrong, the address is never repeated in the message: it may hold a password.
    if "@" in value or {"password", "username"} & parse_qs(value.partition("?")[2]).keys():
        raise refusal("holds a user or a password: take it out, use username and password_file")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise refusal("is not an address: write it as redis://host:6379/0") from None
    if not (parts.path.strip("/") if parts.scheme == "unix" else parts.scheme in ("redis", "rediss") and host):
        raise refusal("must be redis://host:port/db, rediss://host:port/db (TLS) or unix:///path/of/socket")
    return value


def _command(value: tuple[str, ...]) -> tuple[str, ...]:
    if value and not value[0].startswith("/"):
        raise refusal("must begin with the absolute path of a program: no shell and no PATH is asked")
    if any("\0" in one for one in value):
        raise refusal("holds a NUL character")
    return value


def placeholders(*known: str) -> AfterValidator:
    """Refuse a command with an argument in braces that is none of these."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if re.fullmatch(r"\{\w*\}", one) and one[1:-1] not in known:
                names = ", ".join("{" + name + "}" for name in known)
                raise refusal("has no value for {one}: use one of {names}", one=one, names=names)
        return value

    return AfterValidator(check)


def at_least_one(value: tuple[T, ...]) -> tuple[T, ...]:
    """Refuse an empty list."""
    # Field(min_length=1) would count the items that are right, and so add a false problem to the true ones.
    if not value:
        raise refusal("must have at least one item")
    return value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 100:
        raise refusal("must be two rising percentiles within 0 and 100, such as [1, 99.9]")
    return value


SitePath = Annotated[Path, BeforeValidator(_absolute)]
Name = Annotated[str, AfterValidator(_name)]
NamePattern = Annotated[str, AfterValidator(_name_pattern)]
"""A file name with one ``*``, without its extension."""
FilePatterns = Annotated[str, AfterValidator(_file_patterns)]
"""Patterns of whole file names, with ``|`` between."""
ImageType = Annotated[str, BeforeValidator(_image_type)]
"""What a KLARF calls an image: 30, 31, Patch."""
Suffix = Annotated[str, AfterValidator(_suffix)]
ImageSuffix = Annotated[Suffix, AfterValidator(str.lower)]
Label = Annotated[str, AfterValidator(_label)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
Command = Annotated[tuple[str, ...], AfterValidator(_command)]
"""A program by its absolute path, and its arguments; empty for none."""
Percentiles = Annotated[tuple[float, float], AfterValidator(_rising)]
Count = Annotated[int, Field(ge=1)]
OrZero = Annotated[int, Field(ge=0)]
Levels = Annotated[float, Field(ge=0, le=255)]
"""A difference of 8-bit gray levels."""
OrZeroSeconds = Annotated[float, Field(ge=0, le=3600)]
Positive = Annotated[float, Field(gt=0)]
Open = Annotated[float, Field(gt=0, lt=1)]
"""A share or probability that is neither 0 nor 1."""
Share = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """A section of a settings file: frozen, strict, unknown keys refused; a key left blank means all defaults."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _blank_is_all_defaults(cls, value: object) -> object:
        return {} if value is BLANK else value
