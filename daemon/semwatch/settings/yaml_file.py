"""YAML files to validated models, and every fault with its line, its key and what to do.

The YAML read here has no surprises: plain values follow YAML 1.2 (``yes`` and ``on`` are text, ``1e-3`` is a number,
keys are always text), a key may stand once, tags and merge keys are refused, ``~`` and ``$NAME`` are never expanded.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from semwatch.errors import ConfigError

BLANK = object()
"""A key without a value: a section of defaults, elsewhere a fault. ``null`` is None."""

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
"""Values in one file, an alias counted each time it is used: an alias bomb stops here."""
MAX_DEPTH = 8
MAX_FAULTS = 100
"""Most problems of one file that are shown."""
MAX_ECHO = 40
"""Characters of a wrong key or value that a message repeats."""

At = tuple[str | int, ...]
"""Where a setting stands: keys and list positions from the root."""
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class _File:
    """What is known of a file beside its values."""

    path: Path
    lines: dict[At, int]
    faults: list[tuple[int, str]]

    def fault(self, at: At, text: str) -> None:
        """Note a problem on the line of the nearest place that the file shows."""
        line = next((self.lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self.lines), 1)
        where = _dotted(at)
        self.faults.append((line, f"{where}: {text}" if where else text))

    def report(self) -> str:
        """Write the problems out, one a line, in the order of the file."""
        problems = [f"{self.path}:{line}: {text}" for line, text in sorted(self.faults, key=lambda fault: fault[0])]
        if len(problems) == 1:
            return problems[0]
        more = [f"... and {len(problems) - MAX_FAULTS} more"] if len(problems) > MAX_FAULTS else []
        return "\n  ".join([f"{self.path} has {len(problems)} problems:", *problems[:MAX_FAULTS], *more])


def load(path: Path, model: type[M], *, example: Path) -> M:
    """Read a YAML file into a model; ``example`` is the file to start from, named where there is none.

    Raises:
        ConfigError: with every problem found, one a line, as ``file:line: key: remedy``.
    """
    root = _compose(path, _read(path, example))
    file = _File(path, {}, [])
    data = _plain(root, (), root.start_mark.line + 1, file) if root else BLANK
    if data is BLANK:  # an empty recipe is more likely a copy that went wrong than a wish for all defaults
        raise ConfigError(f"{path}: is empty; start from the commented example: cp {example} {path}")
    try:
        settings = model.model_validate(data, context={"folder": path.parent})
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            at = tuple(part for part in detail["loc"] if part != "[key]")
            file.fault(at, _remedy(detail, at, model))
    else:
        if not file.faults:
            return settings
    # Raised outside the handler: a wrong value, perhaps a password, must not show up as the cause.
    raise ConfigError(file.report())


def _read(path: Path, example: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is not a file; give the path of the YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; start from the commented example: cp {example} {path}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its owner and mode") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes; is this the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from None


def _compose(path: Path, text: str) -> yaml.Node | None:
    # BaseLoader makes nodes of text: no value is constructed, no tag is acted on, an alias is the node it names.
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.BaseLoader)
        return root
    except yaml.reader.ReaderError as error:
        line, what = text.count("\n", 0, error.position) + 1, "has a control character; delete it"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, what = (mark.line + 1 if mark else 1), f"is not YAML ({error.problem}); {_syntax_remedy(error.problem)}"
    except (ValueError, OverflowError):  # the scanner's chr() on "\\UFFFFFFFF"
        line, what = 1, "has an escape (\\U...) of no character; take it out"
    except RecursionError:
        line, what = 1, "is nested too deeply; start from the commented example"
    raise ConfigError(f"{path}:{line}: {what}")


def _syntax_remedy(problem: str | None) -> str:
    if "\\t" in (problem or ""):
        return "indent with spaces, not tabs"
    if "another document" in (problem or ""):
        return "keep one document in the file: delete the '---' between them"
    return "check the indentation here and above, and put text with a colon, a # or a * in quotes"


def _plain(node: yaml.Node, at: At, line: int, file: _File) -> object:
    """Turn a node into text, numbers, tuples and dicts; note lines and faults on the way."""
    file.lines[at] = line
    if len(file.lines) > MAX_VALUES or len(at) > MAX_DEPTH:
        raise ConfigError(f"{file.path}:{line}: too many or too deep values; write them out without aliases (*name)")
    if node.tag not in _TAGS:
        file.fault(at, "has a YAML tag (!...): take the tag out")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, at, file)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_plain(item, (*at, i), item.start_mark.line + 1, file) for i, item in enumerate(node.value))
    quoted = isinstance(node, yaml.ScalarNode) and node.style
    return node.value if quoted else _scalar(node.value)


def _mapping(node: yaml.MappingNode, at: At, file: _File) -> dict[str, object]:
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            file.fault(at, f"has a key on line {line} that is not text: write 'key: value' lines")
        elif key == "<<":
            file.fault(at, f"has a merge key (<<) on line {line}: write the settings out")
        elif key in values:
            text = f"{_dotted((*at, key))}: stands twice, first on line {file.lines[*at, key]}: keep one of them"
            file.faults.append((line, text))
        else:
            values[key] = _plain(value_node, (*at, key), line, file)
    return values


def _scalar(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    # Longer digits are no setting of ours, and int() refuses thousands of them.
    if re.fullmatch(r"[-+]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
_WORDS: Mapping[str, object] = {
    "": BLANK,
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("~", "null", "Null", "NULL"), None),
}
_MUST = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text: put it in quotes",
    "tuple_type": "must be a list such as [a, b]",
    "model_type": "must be a block of 'key: value' lines",
    "mapping_type": "must be a block of 'key: value' lines",
}


def _remedy(detail: ErrorDetails, at: At, model: type[BaseModel]) -> str:
    """Say in plain words what a setting must be; repeats a wrong value only where it cannot be a secret."""
    inner, field = _descend(model, at)
    kind, value = detail["type"], detail["input"]
    if kind == "refused":
        return detail["msg"]
    if kind == "extra_forbidden":
        return _unknown_key(str(at[-1]), list(inner.model_fields))
    if kind == "missing":
        text = "is missing: add it"
    elif value is None or value is BLANK:
        text = "is empty: give a value" + ("" if field and field.is_required() else " or delete the key")
    else:
        text = _MUST.get(kind) or re.sub(r"^\w+ should", "must", detail["msg"]).partition(" after validation")[0]
        text += f", not {json.dumps(value)[:MAX_ECHO]}" if isinstance(value, str | int | float) else ""
    return f"{text}. {field.description}" if field and field.description else text


def _unknown_key(key: str, keys: list[str]) -> str:
    nearest = difflib.get_close_matches(key.lower()[:MAX_ECHO], keys, n=1)
    return (
        f"unknown key; did you mean {nearest[0]}?" if nearest else f"unknown key; the keys here are {', '.join(keys)}"
    )


def _descend(model: type[BaseModel], at: At) -> tuple[type[BaseModel], FieldInfo | None]:
    """Find the innermost model on the way, and the last field; list positions and class labels are neither."""
    field = None
    for part in at:
        if part in model.model_fields:
            field = model.model_fields[str(part)]
            model = _model_in(field.annotation) or model
    return model, field


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _dotted(at: At) -> str:
    text = ""
    for part in at:
        key = str(part)[:MAX_ECHO]
        text += f"[{part}]" if isinstance(part, int) else f".{key if key.isprintable() else ascii(key)}"
    return text.removeprefix(".")
