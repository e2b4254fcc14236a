"""How long a pre-training step takes to start, cold and warm: to the first update that is as fast as all that follow.

    python -m benchmarks.start        # 96 clips on a GPU; base model, 4 masks, bf16

Each start is a process of its own. Cold finds empty caches of Triton and inductor, warm those that the cold one filled.
"eager" is `run.compile: none`, "blocks" `run.compile: blocks`; "CUDA graph" is `run.cuda_graph`. A warm start has a
minute; a miss is noted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from benchmarks.runner import Settings, arguments, finish, say
from cat.provenance import ROOT

GOAL_S = 60.0
MODES = {"eager": ("none", False), "blocks": ("blocks", False), "CUDA graph": ("none", True),
         "blocks, CUDA graph": ("blocks", True)}  # fmt: skip


def child(settings: dict[str, Any]) -> dict[str, float]:
    """In a process of its own: seconds since ``settings["began"]``."""
    import torch

    from benchmarks.stem import inputs
    from benchmarks.step_time import OPTIM, build_model
    from cat.training import step as training

    imported, device = time.time(), torch.device(settings["device"])
    torch.set_num_threads(settings["threads"])
    training.COMPILER = settings["compiler"]
    compiled, graph = MODES[settings["mode"]]
    step = training.PretrainStep(
        build_model(settings["shape"]["preset"], "auto", device), OPTIM, precision=settings["dtype"],
        compile=compiled, cuda_graph=graph,
    )  # fmt: skip
    batch = *inputs(settings["shape"], device), None, torch.tensor([0, 0], device=device)
    ended = []
    for _ in range(training.EAGER_STEPS + 1 if graph else 1):
        step(*batch, lr=OPTIM.lr, decay=0.9998).tolist()  # waits for the device
        ended.append(time.time())
    names = {"imports_s": imported, "first_update_s": ended[0], "ready_s": ended[-1]}
    return {name: seconds - settings["began"] for name, seconds in names.items()}


def start(settings: dict[str, Any], caches: Path) -> dict[str, float]:
    """One start. Raises RuntimeError with the process's last words."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "PYTHONPATH": str(ROOT)}
    environment["TRITON_CACHE_DIR"] = str(caches / "triton")
    command = [sys.executable, "-m", "benchmarks.start", "--child", json.dumps({**settings, "began": time.time()})]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{settings['mode']} did not start: {words}")
    return json.loads(done.stdout.splitlines()[-1])


def run(s: Settings) -> Results:
    """Cold starts of eager and blocks, warm ones of all modes."""
    results = Results()
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    given = {"shape": shape, "dtype": s.dtypes[0], "device": s.device.type, "compiler": s.compiler,
             "threads": s.threads}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        for mode, (compiled, graph) in MODES.items():
            if graph and s.device.type != "cuda":
                continue
            for heat in ("warm",) if graph else ("cold", "warm"):  # a graph has no cache of its own
                name = f"{mode}, {heat}"
                try:
                    found = start({**given, "mode": mode}, Path(temporary) / compiled)
                except RuntimeError as error:  # the others go on
                    results.notes.append(f"start: {error}")
                    continue
                results.starts[f"{name}, {s.preset}, {s.clips} clips, {s.dtypes[0]}"] = found
                say(f"start {name}: first update after {found['first_update_s']:.1f} s, ready {found['ready_s']:.1f} s")
                if heat == "warm" and found["ready_s"] > GOAL_S:
                    results.notes.append(f"goal missed: start of {name}: {found['ready_s']:.0f} s, goal {GOAL_S:.0f} s")
                s.saver(results)()
    return results


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return 0
    s = Settings.of(arguments(__doc__.splitlines()[0]).parse_args(), clips_cpu=2, clips_cuda=96)
    return finish(run(s), s, [])


if __name__ == "__main__":
    sys.exit(main())
