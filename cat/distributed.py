"""Several processes that train one model, as ``torchrun`` starts them: which one this is, what they tell each other.

Everything follows from the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT);
other launchers may set the same. Where it is not set there is one process, and nothing here costs anything.

Process 0 writes and speaks for all. What processes tell each other about the run (`agreed`, `gathered`, `from_main`)
goes over the CPU (gloo), so that no GPU is waited for; gradients have a group of their own (NCCL on GPUs).

An error ends all processes, and one of them says it: the process where it happened puts its claim into the store that
torchrun keeps and ends; the others, whose connection breaks, find it there and end in silence.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cat import progress
from cat.config import ConfigError
from cat.device import pick_device
from cat.ending import Unsaid

PATIENCE = 2.0  # seconds in which the others tell that they are still there
_STARTING = 600.0  # seconds until all have found the store
_ENDING = 30  # seconds that a process has to end after an error
_BROKEN = re.compile(r"gloo/|NCCL|ProcessGroup")  # errors of collectives; others may speak of connections too


class Lost(RuntimeError):
    """Another process has gone, or does not answer."""


class Processes:
    """This process among those that train together. `current` gives it."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, restarts: int = 0) -> None:
        self.rank, self.size, self.restarts = rank, size, restarts
        self._local_rank = local_rank
        self._store: dist.Store | None = None
        self._keeps_store = False
        self._mine: dist.Store | None = None  # the same, for the processes of this start alone
        self._control: dist.ProcessGroup | None = None
        self.data: dist.ProcessGroup | None = None  # gradients go over it; None in a single process
        self._timeout, self._on_gpu = 0.0, False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def main(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def abandoned(self) -> bool:
        """Whether torchrun has gone, which would have ended its processes had it not been killed."""
        return self._launcher is not None and os.getppid() != self._launcher

    def device(self, name: str) -> torch.device:
        """`pick_device`; of several processes on GPUs each has the one of its place on its machine.

        Raises: `ConfigError` where there are too few, or one is named for all.
        """
        device = pick_device(name)
        if not self.several or device.type != "cuda":
            return device
        if device.index is not None:
            raise ConfigError(f"run.device is {name!r} with {self.size} processes; expected auto, cuda or cpu")
        count, own = torch.cuda.device_count(), self._local_rank
        if count == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
            own = 0  # the launcher shows every process one GPU of its own
        if own >= count:
            raise ConfigError(
                f"process {self.rank} is number {own + 1} on this machine, but torch sees {count} GPUs; start at most "
                f"that many (torchrun --nproc-per-node {count}), or train on CPUs with run.device=cpu"
            )
        return torch.device("cuda", own)

    # ------------------------------------------------------------ meeting

    def find_store(self, *, timeout: float = _STARTING) -> None:
        """Find the store, by which errors are told before there is anything else."""
        elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not self.several and not elastic:
            return
        self._keeps_store = self.main and not elastic
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            self._store = dist.TCPStore(
                host,
                port,
                is_master=self._keeps_store,
                timeout=datetime.timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise Lost(
                f"process {self.rank} of {self.size} finds no store at {host}:{port} (MASTER_ADDR, MASTER_PORT): "
                f"{_first_line(error)}; is process 0 there, and the port open?"
            ) from error
        self._mine = dist.PrefixStore(f"cat/start{self.restarts}", self._store)
        self._mine.set(f"here/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")

    def connect(self, device: torch.device, timeout: float) -> None:
        """Make the groups, of processes that train on ``device``; they wait ``timeout`` seconds for one another.

        Raises: `Lost` that names the processes that have not come.
        """
        if not self.several or self._control is not None:
            return
        assert self._mine is not None
        self._timeout = timeout
        self._await_all(timeout)
        patience = datetime.timedelta(seconds=timeout)
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.set_device(device)
        try:
            store = dist.PrefixStore("group", self._mine)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=patience)
            self.data = dist.new_group(backend="nccl" if self._on_gpu else "gloo", timeout=patience)
            self._control = dist.new_group(backend="gloo", timeout=patience)
        except RuntimeError as error:
            raise self.cause(error, told=True) from error

    def _await_all(self, timeout: float) -> None:
        """Until all are as far as this, or one has an error to say."""
        assert self._mine is not None
        self._mine.set(f"ready/{self.rank}", "")
        keys = [f"ready/{rank}" for rank in range(self.size)]
        until = time.monotonic() + timeout
        try:
            while not self._mine.check(keys):
                if self._claim() is not None:
                    raise Unsaid
                if time.monotonic() > until:
                    raise Lost(
                        f"{_listed(self._lacking('ready'), self.size)} not come within {timeout:g} s (run.timeout); do "
                        "all machines run the same command, and reach this one?"
                    )
                time.sleep(0.02)
        except dist.DistError as error:  # the store went with process 0
            raise self.cause(error, told=True) from error

    def close(self, *, failed: bool) -> None:
        """Leave the groups: a connection that is closed tells the others that something is wrong here."""
        if failed and self.several and self._on_gpu and hasattr(signal, "alarm"):
            signal.alarm(_ENDING)  # NCCL's threads may wait for ever for a process that has gone, at exit too
        if dist.is_initialized() and self.several:
            with contextlib.suppress(Exception):
                # After an error collectives on a GPU may never end, and destroying their group would wait for them.
                dist.destroy_process_group(self._control if failed and self._on_gpu else None)
        if failed and self.several and self._keeps_store:
            time.sleep(PATIENCE / 2)  # for the others to find in it who says the error
        self._control = self.data = None

    # ------------------------------------------------------------ telling each other

    def agreed(self, numbers: list[int]) -> list[int]:
        """The largest of each number among all processes."""
        if not self.several:
            return numbers
        tensor = torch.tensor(numbers)
        self._tell(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, self._control))
        return tensor.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, which JSON can hold, in the order of their ranks."""
        if not self.several:
            return [value]
        parts = self.gathered_rows(_bytes(value))
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def gathered_rows(self, rows: Tensor) -> list[Tensor]:
        """Every process's (n, ...) tensor on the CPU; n may differ."""
        if not self.several:
            return [rows]
        rows = rows.contiguous()
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._tell(lambda: dist.all_gather(counts, torch.tensor([len(rows)]), self._control))
        most = int(max(counts))
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._tell(lambda: dist.all_gather(parts, padded, self._control))
        return [part[: int(count)] for part, count in zip(parts, counts, strict=True)]

    def from_main(self, value: Any = None) -> Any:
        """The value, which JSON can hold, that process 0 has."""
        if not self.several:
            return value
        content = _bytes(value if self.main else None)
        size = torch.tensor([len(content)])
        self._tell(lambda: dist.broadcast(size, 0, self._control))
        content = content if self.main else torch.empty(int(size), dtype=torch.uint8)
        self._tell(lambda: dist.broadcast(content, 0, self._control))
        return json.loads(content.numpy().tobytes())

    def tensors_from_main(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The tensors, on the CPU, that process 0 has."""
        own = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
        if not self.several:
            return own
        about = self.from_main({n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in own.items()})
        if not self.main:
            own = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in about.items()}
        for tensor in own.values():
            if tensor.numel():
                content = tensor.reshape(-1).view(torch.uint8)
                self._tell(lambda content=content: dist.broadcast(content, 0, self._control))
        return own

    def mean_(self, values: Tensor) -> Tensor:
        """In place the mean over all processes, on the run's device, which is not waited for."""
        return self.sum_(values).div_(self.size) if self.several else values

    def sum_(self, values: Tensor) -> Tensor:
        if self.several:
            dist.all_reduce(values, group=self.data)
        return values

    def _tell(self, collective: Any) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise self.cause(error, told=True) from error

    # ------------------------------------------------------------ restarts

    def begun(self, run: str) -> bool:
        """Whether a run began before torchrun started these processes again: it is then to go on."""
        return self.restarts > 0 and self._store is not None and self._store.check([f"cat/begun/{run}"])

    def begin(self, run: str) -> None:
        if self._store is not None:
            self._store.set(f"cat/begun/{run}", "")

    # ------------------------------------------------------------ errors

    def cause(self, error: Exception, *, told: bool = False) -> Exception:
        """What an error is about: `Unsaid` where another process ended first, `Lost` where one has gone without a word,
        else the error itself. ``told``: it came while processes told each other something."""
        if self._mine is None or not self.several or isinstance(error, Lost | Unsaid):
            return error
        if not told and not _is_broken(error):
            return error
        with contextlib.suppress(RuntimeError):  # the store went with process 0
            self._mine.set(f"still/{self.rank}", "")
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self._claim() is not None:
                return Unsaid()
            time.sleep(0.05)
        lacking = self._lacking("still")
        if not lacking:
            return error
        if "timed out" in str(error).lower():
            return Lost(
                f"{_listed(lacking, self.size)} not answered for {self._timeout:g} s (run.timeout), and the others "
                "waited: it hangs, or its audio is slow to come"
            )
        return Lost(
            f"{_listed(lacking, self.size)} ended without a word: killed (is memory short?), or its machine is gone. "
            "torchrun --max-restarts N goes on by itself from the newest checkpoint"
        )

    def may_speak(self) -> bool:
        """Whether this process is the first that has an error to say."""
        if self._mine is None:
            return True
        with contextlib.suppress(RuntimeError):  # the store went with process 0
            return int(self._mine.compare_set("error", "", str(self.rank))) == self.rank
        return not self.several or self.rank == min(set(range(self.size)) - {0})

    def _claim(self) -> int | None:
        """The process that says the error."""
        try:
            assert self._mine is not None
            return int(self._mine.get("error")) if self._mine.check(["error"]) else None
        except RuntimeError:  # the store went with process 0
            return None

    def _lacking(self, what: str) -> dict[int, str]:
        """The processes that have not left this sign, and where each is."""
        assert self._mine is not None
        found: dict[int, str] = {}
        try:
            for rank in range(self.size):
                if not self._mine.check([f"{what}/{rank}"]):
                    known = self._mine.check([f"here/{rank}"])
                    found[rank] = self._mine.get(f"here/{rank}").decode() if known else ""
        except RuntimeError:
            found.setdefault(0, "")  # which kept the store
        return found


def _listed(lacking: Mapping[int, str], size: int) -> str:
    """ "process 1 of 2 (host7, process 4711) has" """
    names = [f"{rank}{f' ({where})' if where else ''}" for rank, where in lacking.items()]
    one = len(names) == 1
    return f"process{'' if one else 'es'} {', '.join(names)} of {size} (counted from 0) {'has' if one else 'have'}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _is_broken(error: Exception) -> bool:
    """Whether an error may come from another process's end."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


# ---------------------------------------------------------------- this process

_current = Processes()
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def current() -> Processes:
    """This process; inside of `joined` among the others."""
    return _current


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """While entered, this process is one of those that the launcher started. May be entered again inside.

    Processes but the first say nothing. An error is raised as it is in the process that may say it, and in the others
    as `Unsaid`.
    """
    global _current
    if _current is not _ALONE or any(name not in os.environ for name in _LAUNCHED):
        yield _current
        return
    me = Processes(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )
    _current = me
    progress.muted = not me.main
    failed = True
    try:
        me.find_store()
        yield me
        failed = False
    except Exception as error:
        error = me.cause(error)
        if isinstance(error, Unsaid):
            raise error
        if not me.may_speak():
            raise Unsaid from error
        progress.muted = False
        if not me.main:
            error.add_note(f"(process {me.rank} of {me.size}, on {socket.gethostname()})")
        raise error
    finally:
        me.close(failed=failed)
        _current = _ALONE


_ALONE = _current
