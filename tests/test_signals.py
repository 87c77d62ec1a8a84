"""Real signals to a real process: noted once, the second Ctrl-C ends, handlers are put back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from nnunetv2_meddinov3.signals import Stop, leave_stopping_to_the_parent

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")

JOB = """
import signal, sys, time
from nnunetv2_meddinov3.signals import Stop
with Stop() as stop:
    print("ready", flush=True)
    while stop.number is None:
        time.sleep(0.01)
    print("noted", stop.number, flush=True)
    if "twice" in sys.argv:
        time.sleep(30)
print("saved", flush=True)
if "after" in sys.argv:
    time.sleep(30)
"""
WORKER = """
import time
from nnunetv2_meddinov3.signals import leave_stopping_to_the_parent
leave_stopping_to_the_parent()
print("ready", flush=True)
time.sleep(1)
print("finished", flush=True)
"""


@pytest.fixture
def start():
    started = []

    def run(program, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def line(process):
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_work_in_hand_is_finished(start, number):
    process = start(JOB)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert output.splitlines() == [f"noted {int(number)}", "saved"]
    assert errors == ""
    assert process.returncode == 0


def test_a_second_ctrl_c_ends_at_once(start):
    process = start(JOB, "twice")
    process.send_signal(signal.SIGINT)
    assert line(process) == f"noted {int(signal.SIGINT)}"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert output == ""
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert process.returncode == -signal.SIGINT


def test_a_ctrl_c_after_another_signal_ends_at_once_too(start):
    process = start(JOB, "twice")
    process.send_signal(signal.SIGTERM)
    assert line(process) == f"noted {int(signal.SIGTERM)}"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


def test_a_second_sigterm_changes_nothing(start):
    process = start(JOB, "twice")
    process.send_signal(signal.SIGUSR1)
    assert line(process) == f"noted {int(signal.SIGUSR1)}"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)


def test_afterwards_a_signal_ends_the_process_as_ever(start):
    process = start(JOB, "after")
    process.send_signal(signal.SIGTERM)
    assert [line(process), line(process)] == [f"noted {int(signal.SIGTERM)}", "saved"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_handlers_are_put_back_also_after_an_error():
    def mine(number, frame):
        raise AssertionError("not now")

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(RuntimeError, match="stop"), Stop():
            raise RuntimeError("stop")
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_one_in_another_hands_the_signals_back_to_the_outer_one():
    with Stop() as outer:
        with Stop() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (inner.number, outer.number) == (signal.SIGUSR1, signal.SIGTERM)


def test_outside_the_main_thread_nothing_is_noted_and_nothing_fails():
    seen = []

    def work():
        with Stop() as stop:
            seen.append(stop.number)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


def test_a_worker_leaves_stopping_to_its_parent(start):
    process = start(WORKER)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert output == "finished\n"
    assert process.returncode == 0


def test_the_worker_side_needs_no_signal_that_a_system_lacks(monkeypatch):
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    try:
        leave_stopping_to_the_parent()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        with Stop() as stop:
            assert stop.number is None
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
