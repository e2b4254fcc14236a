"""Signals that are noted, and what they end."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cat import signals
from cat.signals import StopSignals

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def as_usual():
    """What a signal does outside: it is listed."""
    found = []
    before = {number: signal.signal(number, lambda number, frame: found.append(number)) for number in HANDLED}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_noted_and_the_second_acts(as_usual, number):
    handlers = {n: signal.getsignal(n) for n in HANDLED}
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
        assert as_usual == []
        signal.raise_signal(signal.SIGHUP)  # a closed terminal sends two
        assert as_usual == []
        signal.raise_signal(signal.SIGTERM)
        assert as_usual == [signal.SIGTERM]
        assert stop.received == number
    assert {n: signal.getsignal(n) for n in HANDLED} == handlers


def test_a_hangup_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_checkpoint_is_asked_for_once():
    with StopSignals() as stop:
        assert not stop.save_asked()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert (stop.save_asked(), stop.save_asked(), stop.received) == (True, False, None)


def test_waiting_ends_at_once():
    with StopSignals() as stop:
        assert stop.wait(lambda: 5) == 5
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        assert stop.wait(lambda: time.sleep(30) or 5) is None
        assert time.monotonic() - started < 10
        assert stop.received == signal.SIGTERM
        assert stop.wait(lambda: pytest.fail("waited for nothing")) is None


def test_what_is_waited_for_may_fail():
    with StopSignals() as stop:
        with pytest.raises(KeyError):
            stop.wait(lambda: {}["x"])

        def killed_too():
            stop._waiting = False  # the signal comes while nothing can be interrupted
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("a data worker was killed")

        assert stop.wait(killed_too) is None


def test_wherever_a_signal_strikes_nothing_is_raised(monkeypatch):
    monkeypatch.setattr(signals, "STOP", ("SIGALRM",))
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    for round in range(2000):
        with signals.StopSignals() as stop:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-7 * round)
            while not stop.received:
                assert stop.wait(lambda: "item") in (None, "item")
    signal.signal(signal.SIGALRM, before)


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with StopSignals() as stop:
            found.append((signal.getsignal(signal.SIGTERM) == before, stop.received))

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, None)]
