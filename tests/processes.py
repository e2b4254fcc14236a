"""Runs commands in several processes that train together, as torchrun would, but forked from one: its start takes
seconds a process.

    python -m tests.processes GROUPS.json

The file has a list of groups, ``{"size": 2, "argv": ["pretrain", ...], "before": "..."}``; ``before`` is Python that
every process runs first, with its ``rank``. Groups run one after the other, or, one with ``"beside": true``, beside the
one before. In place of the file's content come the groups' ends: of every process exit code, stdout and stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

REPOSITORY = Path(__file__).parents[1]
SECONDS = 120  # then a group is killed
# All that a run needs, once for all processes: DistributedDataParallel alone brings two seconds of torch._dynamo along.
IMPORTED = (
    *("cat.commands.finetune", "cat.commands.pretrain", "sklearn.metrics", "soundfile"),
    *("torch._dynamo", "torch.distributed.fsdp"),
)


def together(folder: Path, *groups: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Of every group its processes' ends."""
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
        json.dump(groups, file)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.processes", file.name], cwd=REPOSITORY, env=environment, check=True)
    return json.loads(Path(file.name).read_text())


def _main(path: Path) -> None:
    for name in IMPORTED:
        importlib.import_module(name)

    running, ends, stores = [], [], []
    groups = json.loads(path.read_text())
    for number, group in enumerate(groups):
        # As torchrun's, it stays when process 0 ends.
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        port = stores[-1].port
        outputs = [[path.with_suffix(f".{number}.{rank}.{end}") for end in ("out", "err")] for rank in _ranks(group)]
        children = [_start(group, rank, port, *files) for rank, files in zip(_ranks(group), outputs, strict=True)]
        running.append((outputs, children))
        if not any(following.get("beside") for following in groups[number + 1 : number + 2]):
            ends += [_end(*one) for one in running]
            running = []
    path.write_text(json.dumps(ends))


def _ranks(group: dict[str, Any]) -> list[int]:
    return group.get("ranks") or list(range(group["size"]))


def _start(group: dict[str, Any], rank: int, port: int, out: Path, err: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        where["TORCHELASTIC_USE_AGENT_STORE"] = True
        if group["size"] > 1:
            os.environ.update({name: str(value) for name, value in (where | {"WORLD_SIZE": group["size"]}).items()})
        exec(group.get("before", ""), {"rank": rank, "argv": group["argv"]})
        from cat.commands import main

        code = main(group["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end(outputs: list[list[Path]], children: list[int]) -> list[dict[str, Any]]:
    codes: dict[int, int] = {}
    until = time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(child, 9)
        time.sleep(0.02)
    return [
        {"code": codes[child], "out": out.read_text(), "err": err.read_text()}
        for child, (out, err) in zip(children, outputs, strict=True)
    ]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
