"""The orders of epochs that a process shares with those it forks: right whoever draws them, and drawn once."""

import functools
import os
import pickle
import signal

import numpy as np
import pytest

from cat.data import epochs as module
from cat.data.epochs import Epochs
from cat.data.randomness import Purpose, generator
from cat.data.sampling import Order
from tests.memory import private_memory_of_a_child

LENGTH = 1000


def draw(epoch, log=None):
    if log is not None:
        os.write(log, b"x")
    return generator(0, Purpose.PERMUTATION, epoch).permutation(LENGTH)


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(module, "SHARED_FROM", 1)


def forked(work) -> int:
    """The process that does it, and exits with 0."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:  # this must not go on as a second pytest
            os._exit(1)
        os._exit(0)
    return child


def looks(epochs, seed) -> None:
    """At some places of epochs that are not far apart, in no order."""
    random = np.random.default_rng(seed)
    for step in range(300):
        epoch, place = step // 60 + int(random.integers(2)), int(random.integers(LENGTH))
        assert epochs.at(epoch, place) == draw(epoch)[place]


@pytest.mark.usefixtures("shared")
def test_processes_that_are_forked_see_the_same_orders():
    epochs = Epochs(LENGTH, draw)
    children = [forked(functools.partial(looks, epochs, seed)) for seed in range(4)]
    looks(epochs, 4)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert epochs.whole(3).tolist() == draw(3).tolist()


@pytest.mark.usefixtures("shared")
def test_an_order_is_drawn_once():
    read, write = os.pipe()
    epochs = Epochs(LENGTH, functools.partial(draw, log=write))
    for child in [forked(lambda: [epochs.at(epoch, 5) for epoch in (0, 1) for _ in range(100)]) for _ in range(4)]:
        assert os.waitpid(child, 0)[1] == 0
    assert epochs.whole(1).tolist() == draw(1).tolist()
    os.close(write)
    assert os.read(read, 100) == b"xx"
    os.close(read)


@pytest.mark.usefixtures("shared")
def test_a_process_that_is_killed_while_it_draws_leaves_nothing_half_drawn():
    def half(epoch):
        epochs._shared._orders[epoch % 2][: LENGTH // 2] = 0  # as far as it has come
        os.kill(os.getpid(), signal.SIGKILL)

    epochs = Epochs(LENGTH, half)
    epochs._draw = draw
    assert epochs.at(0, 7) == draw(0)[7]
    epochs._draw = half
    assert os.waitpid(forked(lambda: epochs.at(2, 7)), 0)[1] == signal.SIGKILL
    epochs._draw = draw
    assert [epochs.whole(epoch).tolist() for epoch in (2, 0)] == [draw(2).tolist(), draw(0).tolist()]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("how", ["pickled", "no such memory"])
def test_where_nothing_is_shared(monkeypatch, how):
    if how == "pickled":
        epochs = Epochs(LENGTH, draw)
        epochs.at(0, 0)
        epochs = pickle.loads(pickle.dumps(epochs))
    else:
        monkeypatch.delattr(os, "memfd_create")
        epochs = Epochs(LENGTH, draw)
    assert epochs._shared is None
    looks(epochs, 0)
    first = epochs.whole(0)
    assert epochs.whole(0) is first
    for epoch in range(4):
        epochs.whole(epoch)
    assert len(epochs._own) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads Linux's account of memory")
def test_a_worker_gets_no_order_of_its_own():
    """Two epochs of a million clips were 16 MB in every worker."""
    order = Order(1_000_000, seed=0)
    expected = [next(order.following(epoch * 1_000_000 + 5, 1))[1] for epoch in (0, 1)]
    assert expected == [generator(0, Purpose.PERMUTATION, epoch).permutation(1_000_000)[5] for epoch in (0, 1)]
    assert private_memory_of_a_child(lambda: [list(order.following(at, 1)) for at in range(0, 2_000_000, 9999)]) < 2
