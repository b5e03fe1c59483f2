"""The clusters' file: read, written, and edited by hand into nonsense."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster_files import CLASSES, SIGNED, T0, T1, found, three
from semwatch.classes import clusters
from semwatch.classes.clusters import (
    FILE,
    Clusters,
    as_json,
    label_of,
    names_of,
    parsed,
    pending,
    read,
    successors,
    write,
)
from semwatch.classes.decisions import merged, named, rejected
from semwatch.classes.observations import applied, observe
from semwatch.errors import ConfigError, ServiceUnavailable


def kept(folder: Path, c: Clusters) -> Path:
    """Write a state as a first revision, whatever its own."""
    (folder / FILE).write_text(c.model_copy(update={"revision": max(c.revision, 1)}).model_dump_json(indent=1))
    return folder / FILE


def test_no_file_is_no_cluster(tmp_path) -> None:
    assert read(tmp_path / "nowhere") == Clusters()
    assert successors(Clusters()) == {}
    assert pending(Clusters()) == ()


def test_what_is_written_is_read_back(tmp_path) -> None:
    c = merged(
        named(three(), "novel-1", "void", 12, classes=CLASSES, **SIGNED), "novel-2", "void", classes=(), **SIGNED
    )
    write(tmp_path / "made", three().model_copy(update={"revision": 1}))
    write(tmp_path / "made", c)
    assert read(tmp_path / "made") == c
    assert [p.name for p in (tmp_path / "made").iterdir()] == [FILE]
    assert parsed(as_json(c), "the state") == c


def test_nonsense_is_not_written(tmp_path) -> None:
    broken = three().model_copy(update={"revision": 1, "next_number": 2})
    with pytest.raises(ConfigError, match="left as they are: next_number 2 is too small: novel-3 was given already"):
        write(tmp_path, broken)
    assert read(tmp_path) == Clusters()


def test_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch) -> None:
    write(tmp_path, observe(Clusters(), [found(1)], utc=T0))
    before = (tmp_path / FILE).read_bytes()
    (tmp_path / f".{FILE}.tmp").mkdir()  # the disk refuses, also to root
    with pytest.raises(ServiceUnavailable, match=rf"cannot write {tmp_path / FILE}: Is a directory"):
        write(tmp_path, observe(Clusters(), [found(1)], utc=T1))
    assert (tmp_path / FILE).read_bytes() == before


# --- edited by hand ------------------------------------------------------------------------------------------------


def edits() -> dict[str, tuple[dict[str, Any], str]]:
    """By what was done: {path of keys: value}, and what must be said of it."""
    a, b = ("clusters", 0), ("clusters", 1)
    return {
        "unknown state": ({(*a, "state"): "nice"}, r"clusters\[0\]\.state: Input should be 'proposed'"),
        "unknown key": ({(*a, "colour"): "red"}, r"clusters\[0\]\.colour: Extra inputs"),
        "number as text": ({(*a, "size"): "10"}, r"clusters\[0\]\.size: Input should be a valid integer"),
        "no crops": ({(*a, "size"): 0}, r"clusters\[0\]\.size"),
        "cohesion": ({(*a, "cohesion"): 1.5}, r"clusters\[0\]\.cohesion"),
        "path out of the folder": ({(*a, "examples"): ["../../etc/passwd"]}, r"clusters\[0\]\.examples\[0\]"),
        "not a date": ({(*a, "last_seen_utc"): "yesterday"}, r"clusters\[0\]\.last_seen_utc"),
        "id": ({(*a, "id"): "void"}, r"clusters\[0\]\.id: String should match"),
        "same id": ({(*b, "id"): "novel-1"}, "novel-1 stands there twice"),
        "number": ({("next_number",): 3}, "next_number 3 is too small: novel-3 was given already"),
        "version": ({("schema_version",): 2}, "schema_version: Input should be 1"),
        "verdict as label": ({(*a, "label"): "unknown"}, r"clusters\[0\]\.label: is a verdict, not a class"),
        "id as label": ({(*a, "label"): "novel-2"}, "novel-1 has the label 'novel-2', which is another cluster's id"),
        "learned, with a name": ({(*a, "label"): "void"}, "novel-1 is learned and has the label 'void'"),
        "named, without": ({(*a, "state"): "named"}, "novel-1 is named and has the label 'novel-1'"),
        "learned by none": ({(*a, "head_version"): None}, "novel-1 is learned with head_version None"),
        "proposed, of a head": ({(*b, "head_version"): 2}, "novel-2 is proposed with head_version 2"),
        "same label": (
            {(*a, "state"): "named", (*a, "label"): "Void", (*b, "label"): "void"},
            "the label 'void' is used by novel-1 and by novel-2",
        ),
        "merged into nothing": ({(*a, "state"): "merged"}, "novel-1 is merged with merged_into None"),
        "merged and proposed": ({(*b, "merged_into"): "bridge"}, "novel-2 is proposed with merged_into 'bridge'"),
        "merged into nobody": (
            {(*a, "state"): "merged", (*a, "merged_into"): "novel-9"},
            "novel-1 is merged into novel-9, which does not exist",
        ),
        "merged by nobody": (
            {(*a, "state"): "merged", (*a, "merged_into"): "novel-2"},
            "novel-1 is merged into 'novel-2', which nobody decided",
        ),
    }


@pytest.mark.parametrize("what", edits())
def test_edit_into_nonsense_is_named_with_its_file(tmp_path, what) -> None:
    data = three().model_dump(mode="json")
    changes, said = edits()[what]
    for keys, value in changes.items():
        at = data
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said) as refused:
        read(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / FILE}: ")
    assert "undo the edit" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b'{"clusters": [}', b"\x80pickle", b"9" * 9999])
def test_file_of_other_content_is_refused(tmp_path, content) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="undo the edit"):
        read(tmp_path)


def test_folder_instead_of_the_file_is_refused(tmp_path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def two_merges() -> dict[str, Any]:
    once = merged(three(), "novel-2", "novel-1", classes=CLASSES, **SIGNED)
    return merged(once, "novel-3", "novel-1", classes=CLASSES, **SIGNED).model_dump(mode="json")


def test_merges_in_a_ring_are_refused(tmp_path) -> None:
    data = two_merges()
    for i, into in ((0, "novel-3"), (1, "novel-2")):  # also in the log, so that only the ring is wrong
        data["decisions"][i]["into"] = data["clusters"][i + 1]["merged_into"] = into
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="novel-2 is merged into itself, by way of others"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("revision", 2, "the decisions' revisions do not rise up to the file's own, 2"),
        ("revision", 9, "the decisions' revisions do not rise up to the file's own, 2"),
        ("cluster", "novel-8", "novel-8 was given already"),
        ("kind", "split", "decision 1 is a split with into"),
        ("kind", "reject", "decision 1 is a reject with into"),
        ("kind", "praise", "Input should be 'name', 'merge', 'split', 'reject', 'remove' or 'undo'"),
        ("into", None, "decision 1 is a merge with nothing"),
        ("by", "", r"decisions\[0\]\.by"),
    ],
)
def test_log_that_does_not_hold_together_is_refused(tmp_path, key, value, said) -> None:
    data = two_merges()
    data["decisions"][0][key] = value
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said):
        read(tmp_path)


# --- questions -----------------------------------------------------------------------------------------------------


def test_cluster_is_found_by_id_and_by_name() -> None:
    c = named(three(), "novel-2", "void", classes=CLASSES, **SIGNED)
    assert clusters.find(c, "void") is clusters.find(c, "novel-2")
    with pytest.raises(ConfigError, match="no cluster 'novle-2'; nearest: novel-2, novel-3, novel-1"):
        clusters.find(c, "novle-2")


def test_labels_follow_names_merges_and_rejections() -> None:
    c = named(three(), "novel-1", "void", classes=CLASSES, **SIGNED)
    assert successors(c) == {"novel-1": "void", "void": "void", "novel-2": "novel-2", "novel-3": "novel-3"}
    c = merged(c, "novel-3", "novel-2", classes=CLASSES, **SIGNED)
    c = merged(c, "novel-2", "novel-1", classes=CLASSES, **SIGNED)
    assert label_of(c, "novel-3") == "void"
    c = merged(c, "void", "bridge", classes=CLASSES, **SIGNED)
    assert successors(c) == {"novel-1": "bridge", "void": "bridge", "novel-2": "bridge", "novel-3": "bridge"}
    c = rejected(three(), "novel-1", **SIGNED)
    assert successors(c)["novel-1"] is None


def test_earlier_name_leads_to_the_present_one_until_another_cluster_takes_it() -> None:
    c = named(three(), "novel-1", "viod", classes=CLASSES, **SIGNED)
    c = named(c, "novel-1", "void", classes=(*CLASSES, "viod"), **SIGNED)
    assert successors(c)["viod"] == "void"
    c = named(c, "novel-2", "viod", classes=CLASSES, **SIGNED)
    assert successors(c)["viod"] == "viod"
    assert names_of(c, clusters.find(c, "novel-1")) == {"novel-1", "void"}


def test_name_of_a_rejected_class_is_free_once_no_head_serves_it() -> None:
    c = rejected(named(three(), "novel-1", "void", classes=CLASSES, **SIGNED), "novel-1", **SIGNED)
    with pytest.raises(ConfigError, match="there is a class 'void' already"):
        named(c, "novel-2", "void", classes=CLASSES, **SIGNED)
    c = applied(c, [d.revision for d in pending(c)], T1)
    c = named(c, "novel-2", "void", classes=CLASSES, **SIGNED)
    assert successors(c) == {"novel-1": None, "novel-2": "void", "void": "void", "novel-3": "novel-3"}
    assert Clusters.model_validate(c.model_dump()) == c
