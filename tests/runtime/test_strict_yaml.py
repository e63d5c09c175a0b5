"""YAML in which nothing is lost without a word."""

from pathlib import Path

import pytest

from protoseg.config import load_config
from protoseg.runtime.errors import UserError
from protoseg.runtime.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 7}\ntrain: {iterations: 3}", "f: line 2: the key 'train' stands here and in line 1"),
        ("data:\n  label_map:\n    0: road\n    1: tree\n    0: car", "line 5: the key '0' .* line 3"),
        ("data: {label_map: {1: road, 1: tree}}", "line 1: the key '1' stands here and in line 1"),
        ("{1: a, 0x1: b}", "the key '1' stands here"),
        ("on: 1\nyes: 2", "line 2: the key 'True'"),
        ("x:\n  - {a: 1, b: 2, a: 3}", "line 2: the key 'a'"),
        ("x: {010: road}", "010 is read as the number 8; write 8, or '010' in quotes"),
        ("x: [0777]", "0777 is read as the number 511"),
        ("x: 1:30", "1:30 is read as the number 90"),
        ("x: 1_000", "1_000 is read as the number 1000"),
        ("a: [", "mend the YAML"),
    ],
)
def test_what_would_be_lost_is_an_error(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_yaml(text, "f")
    assert "\n" not in str(error.value)


def test_what_is_plain_stays():
    text = "base: &b {x: 1, y: 2}\nown: {<<: *b, x: 3}\nn: [0, 10, -7, 0x1f, 1.5, 1e-3, 6.0e-5, yes, '010']"
    values = parse_yaml(text, "f")
    assert values["own"] == {"x": 3, "y": 2}
    assert values["n"] == [0, 10, -7, 31, 1.5, "1e-3", 6e-5, True, "010"]


@pytest.mark.parametrize("word", ["null", "~", "no", "Yes", "on", "OFF", "true", "1.0", "2024-01-01", ".inf"])
@pytest.mark.parametrize(
    "place", ["classes: [road, {word}]", "classes: [a, b]\n  label_map: {{0: a, 1: {word}}}"]
)
def test_names_that_yaml_reads_as_something_else(tmp_path: Path, word: str, place: str) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  " + place.format(word=word))
    with pytest.raises(UserError, match=r"c.yaml: data.(classes|label_map): a name was read as .*in quotes"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("data:\n  " + place.format(word=f"'{word}'"))
    data = load_config(tmp_path / "c.yaml").data
    assert word in (data.classes or []) + list((data.label_map or {}).values())


def test_overrides_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    for override, message in (
        ("data.label_map={010: a}", "010 is read as the number 8"),
        ("data.label_map={1: a, 1: b}", "the key '1' stands here"),
        ("data.classes=[a, no]", "a name was read as False"),
        ("data.classes=[1, 2]", "a name was read as 1"),
        ("data.label_map={no: a}", "must be whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / "c.yaml", [override])
