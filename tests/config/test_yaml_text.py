"""YAML that is odd: one line says so, at once, whether it stands in a file or in an override."""

import tracemalloc

import pytest

from rtl_dist.config import load_config, parse_config
from rtl_dist.config.yaml_text import YamlFault, read_yaml, write_yaml
from rtl_dist.core.errors import UserError
from rtl_dist.train import main

GOOD = "data: {path: d}\nstages: [{name: a, epochs: 1, lr: 1}]\n"


def bomb(levels=9, width=10):
    anchors = [f"&a0 [{','.join(['x'] * width)}]"]
    anchors += [f"&a{n} [{','.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return f"[{', '.join(anchors)}]"


def merge_bomb(levels=9, width=10):
    maps = ["- &m0 {k: 1}"]
    maps += [f"- &m{n} {{<<: [{','.join([f'*m{n - 1}'] * width)}]}}" for n in range(1, levels)]
    return "\n".join(maps)


ODD = {
    "aliases": bomb(),
    "merges": merge_bomb(),
    "itself": "&a [*a]",
    "itself in a section": "&a {k: *a}",
    "merged into itself": "&a {<<: *a}",
    "deep lists": "[" * 20_000,
    "deep sections": "{a: " * 20_000,
    "deep block": "\n".join(" " * n + "a:" for n in range(300)),
    "many": f"[{'a,' * 11_000}]",
    "long": "a" * 1_000_000,
    "many keys": "{" + ",".join(f"k{n}: 1" for n in range(5_000)) + "}",
    "int": "!!int x",
    "float": "!!float x",
    "bool": "!!bool foo",
    "timestamp": "!!timestamp foo",
    "map": "!!map x",
    "seq": "!!seq {a: 1}",
    "str of a list": "!!str [a]",
    "set": "!!set {a, b}",
    "binary": "!!binary aGk=",
    "omap": "!!omap [a: 1]",
    "python": "!!python/object/apply:os.system ['true']",
    "own tag": "!x y",
    "a list for a key": "{[a]: 1}",
    "a section for a key": "? {a: b}\n: 1",
    "two documents": "a\n---\nb",
    "no such alias": "*x",
    "control character": "a\x00b",
    "an escape of no character": '"\\U7fffffff"',
    "half an escape": '"\\ud8"',
    "key twice": "{a: 1, a: 2}",
    "merges no section": "{<<: 3}",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_odd_yaml_is_refused_in_one_short_line(tmp_path, text, capfd):
    file = tmp_path / "c.yaml"
    good = tmp_path / "good.yaml"
    good.write_text(GOOD)
    file.write_text(f"{GOOD}optim:\n" + "".join(f"  {line}\n" for line in text.split("\n")))
    if len(text) < 1000:  # it slows the reading of long ones ten times
        tracemalloc.start()
    try:
        for arguments in (["--config", str(file)], ["--config", str(good), f"optim={text}"]):
            assert main(arguments) == 2
            out, err = capfd.readouterr()
            assert err.startswith("rtl-dist: ")
            assert err.count("\n") <= 23  # unknown keys have a line each
            assert max(map(len, err.split("\n"))) < 1000
            assert out == ""
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", ["08", "010", "1_0", "+1", "1:30", "1e3", ".5", "=", "<<", "~", "no", "2026-02-30", ""]
)
def test_text_that_looks_like_something_else_is_written_so_that_it_is_read_as_text(text):
    assert read_yaml(write_yaml({"a": text})) == {"a": text}


def test_numbers_are_written_so_that_they_are_read_as_the_same():
    values = [0, -3, 10**30, 1.5, 1e-7, 1e300, True, None, [], {}]
    read = read_yaml(write_yaml(values))
    assert read == values
    assert [type(value) for value in read] == [type(value) for value in values]


def test_merged_keys_give_way_to_a_section_s_own_and_to_those_of_the_first_source():
    text = "- &a {x: 1, y: 1}\n- &b {x: 2, z: 2}\n- {<<: [*a, *b], y: 3}\n"
    assert read_yaml(text)[2] == {"x": 1, "y": 3, "z": 2}


def test_keys_are_the_text_that_stands_there():
    assert read_yaml("{1: a, no: b, 010: c, null: d, '<<': e}") == {
        **{"1": "a", "no": "b", "010": "c", "null": "d", "<<": "e"}
    }


def test_a_fault_says_where():
    with pytest.raises(YamlFault, match=r"^line 2, column 4: 'x' is no !!int$"):
        read_yaml("a: 1\nb: !!int x")


@pytest.mark.parametrize("value", ["a\nb", "a\x1b[31m", "\ud800", "a\u2028b", "x" * 5000])
def test_text_that_no_name_can_be_is_refused(value):
    tree = {"data": {"path": value}, "stages": [{"name": "a", "epochs": 1, "lr": 1}]}
    with pytest.raises(UserError, match=r"^config: data\.path: (holds|has) ") as caught:
        parse_config(tree)
    assert "\n" not in str(caught.value)


def test_a_key_that_would_forge_a_line_is_shown_in_one():
    with pytest.raises(UserError, match=r"unknown key 'a\\nb'") as caught:
        parse_config({"a\nb": 1, **read_yaml(GOOD)})
    assert "\n" not in str(caught.value)


def test_no_more_of_a_file_is_read_than_a_config_can_have():
    with pytest.raises(UserError, match="is not valid YAML: it has 200,001 characters"):
        load_config("/dev/zero")


def test_many_stages_are_refused_at_once():
    tree = read_yaml(GOOD)
    tree["stages"] *= 101
    with pytest.raises(UserError, match=r"^config: stages: must have at most 100 items, not 101$"):
        parse_config(tree)
