"""Work in several processes: results in order, errors and kills told, nothing left running."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

import pytest

from rtl_dist.core.errors import DataError
from rtl_dist.core.processes import map_in_order


def late_if_even(job, advance):
    time.sleep(0.02 if job % 2 == 0 else 0)
    advance(job)
    return job * job


def refuse_three(job, advance):
    if job == 3:
        raise DataError("three is damaged")
    return job


def die_at_three(job, advance):
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def sleep_long(job, advance):
    if job:
        time.sleep(120)
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_jobs(workers):
    steps = []
    results = list(map_in_order(late_if_even, range(30), workers, steps.append))
    assert results == [n * n for n in range(30)]
    assert sum(steps) == sum(range(30))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_as_it_was_raised(workers):
    with pytest.raises(DataError, match="three is damaged"):
        list(map_in_order(refuse_three, range(50), workers, print))


def test_a_killed_process_is_no_silence():
    with pytest.raises(BrokenProcessPool):
        list(map_in_order(die_at_three, range(50), 2, lambda _: None))


def test_leaving_early_ends_the_processes_at_once():
    started = time.monotonic()
    with closing(map_in_order(sleep_long, [0, 1, 1, 1], 2, lambda _: None)) as results:
        worker = next(results)
    assert time.monotonic() - started < 60
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
