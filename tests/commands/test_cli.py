"""The table of commands: each has its file, each option one home, and help is quick."""

import argparse
import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from rtl_dist.cli import COMMANDS, main

FOLDER = Path(__file__).resolve().parents[2] / "rtl_dist" / "commands"
SHARED = {"__init__", "common", "running"}


def source_of(command):
    return ast.parse(FOLDER.joinpath(COMMANDS[command][0].split(".")[-1] + ".py").read_text())


def parser_of(command):
    parser = argparse.ArgumentParser(prog=f"rtl-dist {command}")
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def test_the_table_has_every_file_of_the_wing():
    files = {path.stem for path in FOLDER.glob("*.py")} - SHARED
    places = [place for place, _ in COMMANDS.values()]
    assert sorted(places) == sorted(f"rtl_dist.commands.{name}" for name in files)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_file_that_says_so_and_help(command, capsys):
    assert ast.get_docstring(source_of(command)).startswith(f"``rtl-dist {command}``: ")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: rtl-dist {command} [-h]")
    assert "--debug" in output
    for action in parser_of(command)._actions:
        assert action.help


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_hands_on_all_that_it_was_given(command):
    """What an option says cannot be forgotten on the way to the call."""
    run = next(n for n in source_of(command).body if getattr(n, "name", "") == "run")
    used = {
        node.attr
        for node in ast.walk(run)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "arguments"
    }
    assert used == {action.dest for action in parser_of(command)._actions} - {"help", "debug"}


def test_an_option_is_written_in_one_file():
    homes = defaultdict(set)
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                name = ast.literal_eval(node.args[0])
                if name.startswith("-"):
                    homes[name].add(path.name)
    assert "--debug" in homes
    assert not {name: files for name, files in homes.items() if len(files) > 1}


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_quick_because_it_imports_only_the_arguments(command):
    words = ["--help"] if command is None else [command, "--help"]
    code = (
        "import sys; from rtl_dist.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('rtl_dist.') or"
        " name in ('torch', 'numpy', 'yaml')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = {"rtl_dist.cli"}
    if command is not None:
        expected |= {"rtl_dist.commands", "rtl_dist.commands.common", COMMANDS[command][0]}
    assert set(done.stdout.splitlines()[-1].split()) == expected


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "no command 'trian'; did you mean train?"),
        ("find_lr", "no command 'find_lr'; did you mean find-lr?"),
        ("x", f"no command 'x'; known: {', '.join(COMMANDS)}"),
    ],
)
def test_an_unknown_command_is_told_the_nearest(word, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word, "--config", "c.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"rtl-dist: error: {hint}"


def test_what_stands_before_a_command_is_for_the_program(capsys):
    for words in (["--version", "trian"], ["--version", "pack"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["--debug", "report", "runs/x"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --debug" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--confg", "x"], "train: error: no option --confg; did you mean --config?"),
        (
            ["train", "--config", "c", "--seed", "1"],
            "no option --seed; a key of the config is given as seed=VALUE",
        ),
        (
            ["train", "--lr=1e-3"],
            "no option --lr; a key of the config is given as stages.NAME.lr=VALUE",
        ),
        (
            ["train", "--batch-size", "8"],
            "no option --batch-size; a key of the config is given as batch.global=VALUE",
        ),
        (
            ["train", "-lr", "1"],
            "no option -lr; a key of the config is given as stages.NAME.lr=VALUE",
        ),
        (
            ["find-lr", "--optim.name", "sgd"],
            "no option --optim.name; a key of the config is given as optim.name=VALUE",
        ),
        (["train", "--config", "a", "--config", "b"], "train: error: --config is given twice"),
        (
            ["pack", "a", "--val-fractoin", "0.1", "b"],
            "no option --val-fractoin; did you mean --val-fraction?",
        ),
        (["index", "a", "b", "--clases", "c"], "no option --clases; did you mean --classes?"),
        (["evaluate", "--xyz", "r"], "no option --xyz; there are -h, --help, --data, "),
        (
            ["train", "--config=~nobody-here/x"],
            "argument --config: there is no home folder of a user 'nobody-here'",
        ),
    ],
)
def test_the_option_at_fault_is_told_not_one_that_it_hid(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_options_and_overrides_come_in_any_order_and_options_may_be_cut(capsys):
    assert main(["train", "seed=1", "--conf", "none.yaml", "sed=2", "--debug"]) == 2
    assert "no config file none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["report", "~/r"], 2, "{home}/r/metrics.jsonl is missing"),
        (["verify", "~/d"], 3, "no data set at {home}/d"),
        (["evaluate", "~/m", "--data=~/d"], 2, "{home}/m is not a model"),
        (["pack", "~/s", "~/out"], 2, "no source at {home}/s"),
        (["index", "train=~/s.tar", "~/out"], 2, "no such shard: {home}/s.tar"),
        (["train", "--config=~/c.yaml"], 2, "no config file {home}/c.yaml"),
    ],
)
def test_a_tilde_is_the_home_folder_and_a_wrong_path_is_named(
    words, code, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    assert said.format(home=tmp_path / "ada") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
