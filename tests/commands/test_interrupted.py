"""A command that is asked to stop says so in a line and leaves with 75, whatever it was at."""

import os
import signal

import pytest

from rtl_dist.commands.running import run_command

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def ask(number):
    os.kill(os.getpid(), number)


def ask_within_a_library(number):
    try:
        ask(number)
    except BaseException as error:
        raise ImportError("initialization failed") from error


def ask_while_a_class_is_made(number):
    exec("ask(number)", {"ask": ask, "number": number})


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [ask, ask_within_a_library, ask_while_a_class_is_made])
def test_a_request_to_stop_is_no_fault_of_ours(capsys, number, at):
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # the tests may run under nohup
    try:
        assert run_command(lambda: at(number), debug=False) == 75
        assert capsys.readouterr().err == "rtl-dist: interrupted; start the same command again\n"
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_a_fault_of_ours_is_still_one(capsys):
    assert run_command(lambda: ask_while_a_class_is_made(None), debug=False) == 1
    assert "this is a fault of rtl_dist itself" in capsys.readouterr().err


def test_what_is_ignored_stays_ignored(capsys):
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(lambda: ask(signal.SIGHUP) or "went on", debug=False) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().out == "went on\n"
