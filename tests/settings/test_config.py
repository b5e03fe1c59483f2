"""Settings files as people write them, right and wrong."""

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from semwatch.errors import ConfigError
from semwatch.settings import yaml_file
from semwatch.settings.fields import EXAMPLES
from semwatch.settings.recipe import KnownClass, Recipe, load_recipe
from semwatch.settings.site import Folder, HostEvent, Limits, MetricsEndpoint, Models, Redis, Site, load_site

SITE = """\
folders:
  - {path: drop/a, source: a, recipe: r.yaml}
results_dir: out
state_dir: state
models: {repository: models}
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write_


def faults(load: Callable[[Path], object], path: Path) -> list[str]:
    """The problems told of a file, each as ``line: text``; the file's name must stand before every one."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = str(caught.value).split("\n  ")
    told = lines[1:] if len(lines) > 1 else lines
    assert all(line.startswith(f"{path}:") for line in told), told
    return [line.removeprefix(f"{path}:") for line in told]


def fault(load: Callable[[Path], object], path: Path) -> str:
    told = faults(load, path)
    assert len(told) == 1, told
    return told[0]


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n...\n"])
@pytest.mark.parametrize("load", [load_site, load_recipe])
def test_empty_file_is_refused_and_the_example_named(write: Write, load: Callable[[Path], object], text: str) -> None:
    with pytest.raises(ConfigError, match=r"empty") as caught:
        load(write(text))
    assert str(EXAMPLES) in str(caught.value)


def test_missing_file_names_the_example_to_copy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; start from .*examples/site\.yaml"):
        load_site(tmp_path / "site.yaml")
    with pytest.raises(ConfigError, match=r"no such file; start from .*examples/recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


def test_folder_is_not_a_settings_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_site(tmp_path)


def test_path_through_a_file_cannot_be_read(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Not a directory\)"):
        load_site(write(SITE) / "site.yaml")


def test_file_of_one_byte_too_many_is_refused_and_of_the_most_is_read(write: Write) -> None:
    head = "name: big\n#"
    assert load_recipe(write(head + "x" * (yaml_file.MAX_BYTES - len(head)))).name == "big"
    with pytest.raises(ConfigError, match="larger than 1000000 bytes"):
        load_recipe(write(head + "x" * (yaml_file.MAX_BYTES - len(head) + 1)))


def test_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"version: 1\nname: \xe4\n")
    assert fault(load_recipe, path).startswith("2: is not UTF-8")


def test_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\r\nversion: 3\r\n")
    assert load_recipe(path) == Recipe(name="x", version=3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [a", r"1: is not YAML \(.*\); check the indentation"),
        ("name: a: b", r"1: is not YAML \(.*\); check the indentation .* quotes"),
        ("gate:\n\tthreshold: 1", r"2: .*indent with spaces, not tabs"),
        ("name: a\n---\nname: b", r"2: .*keep one document"),
        ("name: *nobody", r"1: .*undefined alias"),
        ("name: a\nversion: \x07", r"2: has a control character"),
        ('name: "\\UFFFFFFFF"', r"1: has an escape"),
        ("[" * 5000, r"1: is nested too deeply"),
        ("- a\n- b", r"1: must be a block of 'key: value' lines$"),
        ("just text", r"1: must be a block of 'key: value' lines, not \"just text\""),
    ],
)
def test_text_that_is_not_a_settings_block_is_refused_with_its_line(write: Write, text: str, told: str) -> None:
    assert re.match(told, fault(load_recipe, write(text)))


@given(
    st.one_of(st.binary(max_size=60), st.text("ab:-[]{}&*!<>'\"\\#%@`|?,\n\t 01.~\ud7ff", max_size=60).map(str.encode))
)
@settings(max_examples=300, deadline=None)
def test_no_content_gets_past_the_error_tree(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    told = ""
    try:
        load_recipe(path)
    except ConfigError as error:
        told = str(error)
    assert told.startswith(str(path)) or not told


# --- YAML without surprises ------------------------------------------------------------------------------------------


def test_plain_values_are_what_they_look_like(write: Write) -> None:
    recipe = load_recipe(write("gate: {false_alarm_rate: 1e-3}\nclasses: {no: {code: 010}, 30: {code: -1}}"))
    assert recipe.gate.false_alarm_rate == 0.001
    assert recipe.classes == {"no": KnownClass(code=10), "30": KnownClass(code=-1)}


def test_quoted_number_is_text(write: Write) -> None:
    assert load_recipe(write("name: '30'")).name == "30"
    assert 'must be a whole number, not "3"' in fault(load_recipe, write("version: '3'"))


@pytest.mark.parametrize("text", ["yes", "on", "'true'", "1", "0"])
def test_only_true_and_false_are_booleans(write: Write, text: str) -> None:
    assert "must be true or false" in fault(load_recipe, write(f"classes: {{a: {{code: 1, doi: {text}}}}}"))


@pytest.mark.parametrize("text", ["true", "1.0", "two", "'2'", "[1]", "999999999999999999999"])
def test_only_digits_are_a_whole_number(write: Write, text: str) -> None:
    assert "version: must be a whole number" in fault(load_recipe, write(f"version: {text}"))


@pytest.mark.parametrize("text", ["true", ".inf", ".nan", "1_0", "0x1", "1:30"])
def test_only_decimals_are_a_number(write: Write, text: str) -> None:
    assert "gate.threshold: must be a number" in fault(load_recipe, write(f"gate: {{threshold: {text}}}"))


def test_number_beyond_all_range_is_refused(write: Write) -> None:
    assert "must be a finite number" in fault(load_recipe, write("gate: {threshold: 1e999}"))


def test_key_that_stands_twice_is_refused_and_both_lines_named(write: Write) -> None:
    told = fault(load_recipe, write("gate:\n  threshold: 1\n  false_alarm_rate: 0.1\n  threshold: 2\n"))
    assert told == "4: gate.threshold: stands twice, first on line 2: keep one of them"


def test_class_that_stands_twice_is_refused(write: Write) -> None:
    assert "classes.a: stands twice" in fault(load_recipe, write("classes:\n  a: {code: 1}\n  'a': {code: 2}\n"))


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [exit]", "!!int 3", "!mine x"])
def test_tags_are_refused_and_never_acted_on(write: Write, value: str) -> None:
    assert any("has a YAML tag" in told for told in faults(load_recipe, write(f"name: {value}")))


def test_merge_key_and_key_that_is_no_text_are_refused_with_their_lines(write: Write) -> None:
    told = faults(load_recipe, write("crop:\n  context: 3.0\n  <<: {context: 2.0}\n  ? [a]\n  : 1\n"))
    assert ["merge key (<<) on line 3" in told[0], "key on line 4 that is not text" in told[1]] == [True, True]


def test_alias_is_the_value_it_names(write: Write) -> None:
    assert load_recipe(write("classes:\n  a: &nuisance {code: 2, doi: false}\n  b: *nuisance\n")).classes["b"].code == 2


@pytest.mark.timeout(20)
def test_alias_bomb_and_alias_ring_are_harmless(write: Write) -> None:
    rows = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
    ]
    assert "too many or too deep values" in fault(load_recipe, write("\n".join(rows)))
    assert "too many or too deep values" in fault(load_recipe, write("name: &ring [*ring]"))
    assert "too many or too deep values" in fault(load_recipe, write(f"name: [{'a,' * yaml_file.MAX_VALUES}]"))


def test_blank_section_is_its_defaults(write: Write) -> None:
    assert load_recipe(write("gate:\ncrop:\n  # nothing here\npins: {}\n")) == Recipe()
    site = load_site(write(SITE + "metrics:\nlimits:\n"))
    assert (site.metrics, site.limits) == (MetricsEndpoint(), Limits())


def test_blank_section_still_needs_what_has_no_default(write: Write) -> None:
    assert fault(load_site, write(SITE + "redis:\n")).startswith("6: redis.url: is missing: add it")


def test_null_section_is_off(write: Write) -> None:
    site = load_site(write(SITE + "metrics: null\nredis: ~\n"))
    assert (site.metrics, site.redis) == (None, None)


def test_blank_value_is_a_forgotten_one(write: Write) -> None:
    assert "version: is empty: give a value or delete the key" in fault(load_recipe, write("version:"))
    assert "results_dir: is empty: give a path" in fault(load_site, write(SITE.replace("out", "")))
    assert "folders: is empty: give a value." in fault(load_site, write(SITE.replace("\n  - {", " #")))


# --- what a message says ---------------------------------------------------------------------------------------------


def test_every_problem_is_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = """\
folders:
  - path: ~/drop
    source: tool a
    recipe: recipe.yaml
    completeness: stedy
    recursive: yes
    sufixes: [.tif]
reslts_dir: results
models: embedded
limits:
  in_flight: two
  max_pages: 0
limits: {}
poll_s: !!float 2
"""
    told = faults(load_site, write(text))
    assert [re.match(r"(\d+): ([\w.\[\]]+): ", line).groups() for line in told] == [  # type: ignore[union-attr]
        ("1", "results_dir"),
        ("1", "state_dir"),
        ("2", "folders[0].path"),
        ("3", "folders[0].source"),
        ("5", "folders[0].completeness"),
        ("6", "folders[0].recursive"),
        ("7", "folders[0].sufixes"),
        ("8", "reslts_dir"),
        ("9", "models"),
        ("11", "limits.in_flight"),
        ("12", "limits.max_pages"),
        ("13", "limits"),
        ("14", "poll_s"),
    ]


def test_several_problems_have_a_headline_and_very_many_are_counted(write: Write) -> None:
    path = write("".join(f"k{i}: 1\n" for i in range(yaml_file.MAX_FAULTS + 7)))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} has {yaml_file.MAX_FAULTS + 7} problems:"
    assert lines[-1] == "  ... and 7 more"
    assert len(lines) == yaml_file.MAX_FAULTS + 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gate: {treshold: 1}", "1: gate.treshold: unknown key; did you mean threshold?"),
        ("Gate: {}", "1: Gate: unknown key; did you mean gate?"),
        ("pins:\n  heads: 3", "2: pins.heads: unknown key; did you mean head?"),
        ("classes: {a: {cod: 1, code: 2}}", "1: classes.a.cod: unknown key; did you mean code?"),
        ("classes: {code: {cod: 1, code: 2}}", "1: classes.code.cod: unknown key; did you mean code?"),
        ("crop: {zzz: 1}", "1: crop.zzz: unknown key; the keys here are context, min_side_fraction"),
    ],
)
def test_unknown_key_is_told_with_the_nearest_valid_one(write: Write, text: str, told: str) -> None:
    assert fault(load_recipe, write(text)) == told


def test_wrong_class_name_is_told_at_the_class(write: Write) -> None:
    told = fault(load_recipe, write("version: 1\nclasses:\n  unknown: {code: 1}"))
    assert told == "3: classes.unknown: is a verdict, not a class: give its code as unknown_code"


def test_unknown_key_in_a_list_item_is_told_with_its_position(write: Write) -> None:
    told = fault(load_site, write(SITE.replace("recipe: r.yaml", "recipe: r.yaml, reciepe: x")))
    assert told == "2: folders[0].reciepe: unknown key; did you mean recipe?"


def test_wrong_value_is_told_with_what_the_setting_means(write: Write) -> None:
    told = fault(load_site, write(SITE + "limits:\n  in_flight: two\n"))
    assert told == '7: limits.in_flight: must be a whole number, not "two". Files under review at the same time.'


def test_terminal_escapes_in_a_key_are_not_repeated(write: Write) -> None:
    assert "\x1b" not in fault(load_recipe, write('"\\e[31mred": 1'))


def test_long_key_and_value_are_cut(write: Write) -> None:
    assert len(fault(load_recipe, write("x" * 5000 + ": 1"))) < 300
    assert len(fault(load_recipe, write("version: " + "x" * 5000))) < 300


# --- limits of values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "name: a b",
        "name: .hidden",
        "name: a/b",
        "version: -1",
        "pins: {head: 0}",
        "gate: {false_alarm_rate: 0}",
        "gate: {false_alarm_rate: 1}",
        "gate: {threshold: -0.1}",
        "gate: {self_calibration: yes}",
        "gate: {miss_cost: 0}",
        "binarization: {method: magic}",
        "binarization: {grid_px: 8}",
        "binarization: {n_thresholds: 1}",
        "binarization: {percentiles: [99, 1]}",
        "binarization: {percentiles: [1]}",
        "binarization: {percentiles: [1, 2, 3]}",
        "binarization: {percentiles: [-1, 2]}",
        "binarization: {epsilon: 2}",
        "binarization: {epsilon: false}",
        "binarization: {min_plateau: 65}",
        "binarization: {max_mask_fraction: 0}",
        "binarization: {max_defects: 0}",
        "binarization: {merge_fraction: 1}",
        "crop: {context: 0.9}",
        "crop: {min_side_fraction: 0}",
        "unknown: {significance: 0}",
        "unknown: {decide_confidence: 1.1}",
        "classes: {a: 3}",
        "classes: {a: {}}",
        "classes: [a]",
        "classes: {'': {code: 1}}",
        "classes: {' a': {code: 1}}",
        "classes: {unknown: {code: 1}}",
        "classes: {non-decidable: {code: 1}}",
        "unknown_code: none",
    ],
)
def test_recipe_refuses_what_makes_no_sense(write: Write, text: str) -> None:
    assert any(told.startswith(f"1: {text.partition(':')[0]}") for told in faults(load_recipe, write(text)))


def test_recipe_takes_the_last_values_that_make_sense(write: Write) -> None:
    recipe = load_recipe(
        write(
            "gate: {false_alarm_rate: 0.999, threshold: 0}\n"
            "binarization: {min_plateau: 64, percentiles: [0, 100], epsilon: 1, max_mask_fraction: 1}\n"
            "crop: {context: 1, min_side_fraction: 1}\nunknown: {decide_confidence: 1}\nunknown_code: -1\n"
        )
    )
    assert recipe.binarization.percentiles == (0.0, 100.0)
    assert recipe.crop.context == 1.0


@pytest.mark.parametrize(
    ("settings_of_folder", "key"),
    [
        ("steady_s: 0", "steady_s"),
        ("suffixes: []", "suffixes"),
        ("suffixes: [tif]", "suffixes[0]"),
        ("suffixes: .tif", "suffixes"),
        ("marker_suffixes: []", "marker_suffixes"),
        ("marker_suffixes: ['.a/b']", "marker_suffixes[0]"),
        ("polling: 1", "polling"),
    ],
)
def test_folder_refuses_what_makes_no_sense(write: Write, settings_of_folder: str, key: str) -> None:
    told = fault(load_site, write(SITE.replace("r.yaml}", f"r.yaml, {settings_of_folder}}}")))
    assert told.startswith(f"2: folders[0].{key}: must ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("limits: {in_flight: 0}", "limits.in_flight"),
        ("limits: {in_flight: 65}", "limits.in_flight"),
        ("limits: {stop_timeout_s: 0}", "limits.stop_timeout_s"),
        ("metrics: {port: 0}", "metrics.port"),
        ("metrics: {port: 65536}", "metrics.port"),
        ("metrics: {host: ''}", "metrics.host"),
        ("reconcile_s: 0", "reconcile_s"),
        ("poll_s: -1", "poll_s"),
    ],
)
def test_site_refuses_what_makes_no_sense(write: Write, text: str, key: str) -> None:
    assert fault(load_site, write(SITE + text)).startswith(f"6: {key}: must ")


def test_runtime_that_is_not_there_is_refused_with_the_one_that_is(write: Write) -> None:
    told = fault(load_site, write(SITE.replace("models}", "models, runtime: openvino}")))
    assert "models.runtime: must be 'embedded' or 'triton', not \"openvino\"" in told


def test_image_suffixes_are_lowered_and_markers_kept_as_written(write: Write) -> None:
    folder = load_site(write(SITE.replace("r.yaml}", "r.yaml, suffixes: [.TIF], marker_suffixes: [.DONE]}"))).folders[0]
    assert (folder.suffixes, folder.marker_suffixes) == ((".tif",), (".DONE",))


# --- paths -----------------------------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_file_and_absolute_ones_stay(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SITE.replace("out", "../out").replace("state\n", "/var/state\n")
    path = write(text + "redis: {url: 'rediss://h', password_file: pw, ca_file: ca.pem}\n")
    monkeypatch.chdir(tmp_path)
    for site in (load_site(path), load_site(Path(path.name))):
        assert site.folders[0].path == tmp_path / "drop/a"
        assert site.folders[0].recipe == tmp_path / "r.yaml"
        assert site.results_dir == tmp_path.parent / "out"
        assert site.state_dir == Path("/var/state")
        assert site.models.repository == tmp_path / "models"
        assert site.redis is not None
        assert (site.redis.password_file, site.redis.ca_file) == (tmp_path / "pw", tmp_path / "ca.pem")


@pytest.mark.parametrize("value", ["~/out", "~fab/out", "$HOME/out", "/data/$LOT", "/data/x${LOT}"])
def test_home_and_environment_are_refused_because_nothing_expands_them(write: Write, value: str) -> None:
    told = fault(load_site, write(SITE.replace("out", f"'{value}'")))
    assert told == "3: results_dir: '~' and '$NAME' are not expanded: write the whole path"


@pytest.mark.parametrize("value", ["/mnt/C$/out", "out~", "a b"])
def test_path_of_a_windows_share_is_a_path(write: Write, tmp_path: Path, value: str) -> None:
    assert load_site(write(SITE.replace("out", f"'{value}'"))).results_dir == tmp_path / value


@pytest.mark.parametrize("value", ["''", "3", "[a]", "true", '"a\\nb"', '"\\0"', '"\\ud800"'])
def test_what_is_no_path_is_refused(write: Write, value: str) -> None:
    assert "results_dir: must be a path" in fault(load_site, write(SITE.replace("out", value)))


# --- several settings together ---------------------------------------------------------------------------------------


def two_folders(first: str, second: str, *, source: str = "b", results: str = "out", state: str = "state") -> str:
    return f"""\
folders:
  - {{path: '{first}', source: a, recipe: r.yaml}}
  - {{path: '{second}', source: {source}, recipe: r.yaml}}
results_dir: {results}
state_dir: {state}
models: {{repository: models}}
"""


def test_site_without_folders_is_refused(write: Write) -> None:
    assert fault(load_site, write(SITE.replace("\n  - {path: drop/a, source: a, recipe: r.yaml}", " []"))) == (
        "1: folders: must have at least one item"
    )


def test_wrong_folder_is_not_told_as_a_missing_one_too(write: Write) -> None:
    assert "path" in fault(load_site, write(SITE.replace("drop/a", "~/a")))


def test_folders_side_by_side_are_well(write: Write) -> None:
    assert len(load_site(write(two_folders("drop/a", "drop/ab"))).folders) == 2
    assert len(load_site(write(two_folders("drop/a b", "drop/a"))).folders) == 2


def test_source_of_two_folders_is_refused(write: Write) -> None:
    assert fault(load_site, write(two_folders("x", "y", source="a"))).startswith(
        "3: folders[1].source: is used by another"
    )


@pytest.mark.parametrize(
    ("first", "second", "inner"),
    [("d", "d", 1), ("d", "d/e/f", 1), ("d/e", "d", 0), ("d", "x/../d/e", 1), ("d", "./d", 1)],
)
def test_folder_in_another_is_refused(write: Write, first: str, second: str, inner: int) -> None:
    told = fault(load_site, write(two_folders(first, second)))
    assert told.startswith(f"{2 + inner}: folders[{inner}].path: lies in the drop folder")


def test_folder_in_another_through_a_link_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "d/e")
    assert "folders[1].path: lies in the drop folder" in fault(load_site, write(two_folders("d", "link")))


def test_ring_of_links_is_only_a_folder_that_is_not_there(write: Write, tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert load_site(write(two_folders("ring", "d"))).folders[0].path == tmp_path / "ring"


def test_results_and_state_in_a_drop_folder_are_refused_together(write: Write) -> None:
    told = faults(load_site, write(two_folders("d", "e", results="e/out", state="d")))
    assert [line.partition(" lies")[0] for line in told] == ["4: results_dir:", "5: state_dir:"]


def test_results_in_a_drop_folder_through_a_link_are_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "results_dir: lies in the drop folder" in fault(
        load_site, write(two_folders("link", "e", results="real/out"))
    )


def test_drop_folder_in_the_results_is_well(write: Write, tmp_path: Path) -> None:
    assert load_site(write(two_folders("d/a", "d/b", results="d"))).results_dir == tmp_path / "d"


# --- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://127.0.0.1:6379/0", "rediss://[::1]:6380", "unix:///run/redis.sock", "unix:///r?db=1"]
)
def test_redis_addresses_are_taken(write: Write, url: str) -> None:
    site = load_site(write(SITE + f"redis: {{url: '{url}'}}"))
    assert site.redis == Redis(url=url)


@pytest.mark.parametrize(
    "url", ["h:6379", "http://h", "redis://", "redis:///0", "unix://", "unix:///", "redis://h:port", "redis://[h", "''"]
)
def test_what_is_no_redis_address_is_refused(write: Write, url: str) -> None:
    told = fault(load_site, write(SITE + f"redis: {{url: '{url}'}}" if url != "''" else SITE + "redis: {url: ''}"))
    assert told.startswith("6: redis.url: ")
    assert "redis://host" in told


@pytest.mark.parametrize(
    "settings_of_redis",
    [
        "url: 'redis://:s3cret@h:6379'",
        "url: 'redis://daemon:s3cret@h'",
        "url: 'redis://:s3/cret@h'",
        "url: 'redis://:s3#cret@h'",
        "url: 'redis://s3cret@h'",
        "url: 'redis://h?password=s3cret'",
        "url: 'http://:s3cret@h'",
        "url: ['redis://:s3cret@h']",
        "url: redis://h, password: s3cret",
        "url: redis://h, password_file: [s3cret]",
        "url: 'redis://h:s3cret'",
    ],
)
def test_password_in_the_settings_is_refused_and_never_repeated(write: Write, settings_of_redis: str) -> None:
    path = write(SITE + f"redis: {{{settings_of_redis}}}")
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert "s3" not in "".join(traceback.format_exception(caught.value)).replace(str(path), "")


def test_password_is_not_repeated_where_settings_are_built_in_code() -> None:
    with pytest.raises(ValidationError) as caught:
        Redis(url="redis://:s3cret@h")
    assert "s3" not in str(caught.value)


def test_password_in_the_address_is_told_where_to_go(write: Write) -> None:
    told = fault(load_site, write(SITE + "redis: {url: 'redis://:s3cret@h'}"))
    assert told == "6: redis.url: holds a user or a password: take it out, use username and password_file"


def test_password_key_is_told_as_password_file(write: Write) -> None:
    assert "did you mean password_file?" in fault(load_site, write(SITE + "redis: {url: redis://h, password: x}"))


def test_authority_file_without_tls_is_refused(write: Write) -> None:
    told = fault(load_site, write(SITE + "redis: {url: redis://h, ca_file: ca.pem}"))
    assert told == "6: redis: ca_file works with rediss:// only: change the url or delete ca_file"


# --- the recipe's identity -------------------------------------------------------------------------------------------


def test_recipe_of_defaults_has_a_known_identity() -> None:
    # It stands in results and audit logs for years: a change of a default or a key must be a decision.
    assert Recipe().id == "744d6db1c4ea61db"


def test_identity_is_deaf_to_comments_order_spacing_and_written_out_defaults(write: Write) -> None:
    one = load_recipe(write("name: m2\nclasses:\n  a: {code: 1}\n  b: {code: 2}\ncrop: {context: 3}\n"))
    two = load_recipe(
        write(
            "# hi\ncrop:\n    context: 3.0 # x\nclasses: {b: {code: 2, doi: true}, 'a': {code: 1}}\n\nname: 'm2'\ngate:"
        )
    )
    assert one.id == two.id
    assert re.fullmatch(r"[0-9a-f]{16}", one.id)


def changed(value: Any) -> Any:  # noqa: PLR0911 - one line a type
    """Another valid value of the same setting."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 if value < 1 else value + 0.5
        case "plateau":
            return "otsu"
        case "flag":
            return "quarantine"
        case "propose":
            return "use"
        case str():
            return value + "x"
        case tuple():
            return (value[0], value[1] - 1)
        case None:
            return 7
    raise AssertionError(value)


def leaves(model: BaseModel, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key in type(model).model_fields:
        value = getattr(model, key)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*at, key))
        elif not isinstance(value, Mapping):
            yield (*at, key)


@pytest.mark.parametrize("at", [at for at in leaves(Recipe()) if at[0] != "klarf"], ids=".".join)
def test_any_value_changes_the_identity(at: tuple[str, ...]) -> None:
    content = Recipe().model_dump()
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = "*_ref" if at == ("reference", "pattern") else changed(inner[at[-1]])
    assert Recipe.model_validate(content).id != Recipe().id


def test_of_the_klarf_only_what_judges_images_changes_the_identity() -> None:
    def identity(**klarf: Any) -> str:
        return Recipe.model_validate({"klarf": klarf}).id

    on = identity(pattern="*.001")
    assert identity(deadline_s=1.0) == identity(reference_types=("1",)) == Recipe().id != on
    assert identity(pattern="*.klarf", target_column="FINEBINNUMBER", deadline_s=1.0, outbox="/x") == on
    judging = [{"reference_types": ("30",)}, {"ignored_types": ("30",)}, {"order": ("test",)}]
    assert len({on, *(identity(pattern="*.001", **one) for one in judging)}) == 4


@pytest.mark.parametrize(
    ("klarf", "says"),
    [
        ('pattern: ""', "patterns of file names"),
        ('pattern: "*"', "patterns of file names"),
        ('pattern: "lot/*.001"', "patterns of file names"),
        ("defect_rule: nearest", "nearest_centre"),
        ("target_column: A B", "target_column"),
        ("max_defects: 10000000", "2000000|2,000,000"),
        ("outbox: ~/out", "not expanded"),
    ],
)
def test_klarf_section_is_held_against_what_can_work(write: Write, klarf: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(write(f"klarf: {{{klarf}}}\n"))


def test_every_part_of_the_class_table_changes_the_identity() -> None:
    tables = [
        {},
        {"a": (1, True)},
        {"a": (2, True)},
        {"a": (1, False)},
        {"b": (1, True)},
        {"a": (1, True), "b": (1, True)},
    ]
    made = [Recipe(classes={k: KnownClass(code=c, doi=d) for k, (c, d) in table.items()}) for table in tables]
    assert len({recipe.id for recipe in made}) == len(tables)


def test_recipe_survives_its_own_dump() -> None:
    recipe = Recipe(name="x", classes={"a": KnownClass(code=1)})
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_nothing_in_a_recipe_or_site_can_be_changed(write: Write) -> None:
    recipe, site = Recipe(classes={"a": KnownClass(code=1)}), load_site(write(SITE))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.gate.threshold = 1.0
    with pytest.raises(TypeError, match="assignment"):
        recipe.classes["b"] = KnownClass(code=2)  # type: ignore[index]
    with pytest.raises(ValidationError, match="frozen"):
        site.folders[0].source = "b"


# --- the examples ----------------------------------------------------------------------------------------------------


def test_examples_are_valid_as_they_stand() -> None:
    site = load_site(EXAMPLES / "site.yaml")
    assert load_recipe(site.folders[0].recipe).name == "metal2-adi"
    assert (site.redis, site.metrics, site.limits) == (None, None, Limits())


def test_example_recipe_shows_every_setting_with_its_default(write: Write) -> None:
    shown = load_recipe(EXAMPLES / "recipe.yaml")
    own = {"name", "classes", "unknown_code", "non_decidable_code"}
    assert shown.model_dump(exclude=own) == Recipe().model_dump(exclude=own)
    assert all_set(shown) == all_keys(Recipe)


def test_example_site_shows_every_setting_with_its_default(write: Write) -> None:
    text = re.sub(r"^( *)#(?=\w+:)", r"\1", (EXAMPLES / "site.yaml").read_text(), flags=re.MULTILINE)
    site = load_site(write(text))
    folder, redis = site.folders[0], site.redis
    assert redis is not None
    assert folder == Folder(path=folder.path, source=folder.source, recipe=folder.recipe)
    assert redis == Redis(url=redis.url)
    assert site.models == Models(repository=site.models.repository)
    assert site == Site(
        folders=site.folders,
        results_dir=site.results_dir,
        state_dir=site.state_dir,
        models=site.models,
        redis=redis,
        host_event=HostEvent(),
        metrics=MetricsEndpoint(),
    )
    assert all_set(site) == all_keys(Site)
    assert all_set(folder) == all_keys(Folder)


def all_keys(model: type[BaseModel]) -> set[str]:
    """Dotted keys of a model and of the models in it, lists and class tables apart."""
    keys = set(model.model_fields)
    for key, field in model.model_fields.items():
        inner = yaml_file._model_in(field.annotation)
        if inner not in (None, Folder, KnownClass):
            assert inner is not None
            keys |= {f"{key}.{name}" for name in all_keys(inner)}
    return keys


def all_set(settings_read: BaseModel) -> set[str]:
    """Dotted keys that stood in the file."""
    keys = set(settings_read.model_fields_set)
    for key in settings_read.model_fields_set:
        value = getattr(settings_read, key)
        if isinstance(value, BaseModel):
            keys |= {f"{key}.{name}" for name in all_set(value)}
    return keys


@pytest.mark.parametrize("model", [Site, Folder, Models, Redis, Limits, MetricsEndpoint, Recipe, KnownClass])
def test_every_setting_says_what_it_means(model: type[BaseModel]) -> None:
    for key, field in model.model_fields.items():
        assert field.description, key
        inner = yaml_file._model_in(field.annotation)
        assert inner is None or all(f.description for f in inner.model_fields.values())
