"""Damaged site and recipe files: settings, or a ``ConfigError`` that names the file."""

import fuzzing


def test_damaged_settings_are_read_or_refused_with_the_name_of_the_file() -> None:
    tried = fuzzing.settings(60, 162)
    assert tried.n_read > 0
    assert tried.n_refused > 20
