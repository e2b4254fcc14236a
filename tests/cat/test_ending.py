"""SIGTERM and SIGHUP end a command by an exception: what is half written is cleaned up on the way out."""

from __future__ import annotations

import signal

import pytest

from cat.ending import Ended, ending_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_way_out_is_walked(number):
    cleaned = []

    def work():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGHUP)  # a terminal that is closed may send a second one
            cleaned.append(number)

    with pytest.raises(Ended) as ended, ending_on_signals():
        work()
    assert (ended.value.number, ended.value.exit_code, ended.value.code) == (number, 128 + number, 128 + number)
    assert cleaned == [number]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_what_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_on_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_error_of_a_library_takes_it_for_its_own():
    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("was caught")

    with pytest.raises(Ended), ending_on_signals():
        work()
