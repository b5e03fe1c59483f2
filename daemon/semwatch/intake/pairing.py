"""Which file is the reference of which: by names alone, as the recipe's ``reference`` section has them."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from semwatch.settings.recipe import Reference


def partner_of(path: str, rule: Reference) -> str | None:
    """Return the path, without extension, of the image that a reference belongs to; None where this is no reference.

    >>> partner_of("lot/a_ref.tif", Reference(pattern="*_ref"))
    'lot/a'
    >>> partner_of("lot/a.tif", Reference(pattern="*_ref")) is None
    True
    """
    if rule.pattern is None:
        return None
    shared = _shared(PurePosixPath(path).stem, rule.pattern)
    return None if shared is None else str(PurePosixPath(path).with_name(rule.inspected.replace("*", shared)))


def references_of(path: str, rule: Reference, suffixes: Sequence[str]) -> tuple[str, ...]:
    """Return the paths that the reference of an image may have, the likeliest first; none where it has none.

    Args:
        path: of the image, POSIX.
        rule: the recipe's.
        suffixes: image extensions of the folder, lower case; that of the image itself comes first, as it is spelled.

    >>> references_of("lot/case2_inspected.tif", Reference(pattern="*_ref", inspected="*_inspected"), (".tif", ".png"))
    ('lot/case2_ref.tif', 'lot/case2_ref.png')
    """
    image = PurePosixPath(path)
    if rule.pattern is None or partner_of(path, rule) is not None:
        return ()
    shared = _shared(image.stem, rule.inspected)
    if shared is None:
        return ()
    stem = rule.pattern.replace("*", shared)
    own = image.suffix
    spelled = [own, *(one.upper() if own.isupper() else one for one in suffixes if one != own.lower())]
    return tuple(str(image.with_name(stem + suffix)) for suffix in spelled)


def _shared(stem: str, pattern: str) -> str | None:
    """Return what the ``*`` of a pattern stands for in a name; None where the name does not fit."""
    before, _, after = pattern.partition("*")
    fits = len(stem) > len(before) + len(after) and stem.startswith(before) and stem.endswith(after)
    return stem[len(before) : len(stem) - len(after)] if fits else None
