"""The examples of `recipes/launch`: Slurm's runs with stand-ins for Slurm, Kubernetes' fits together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.documented import ROOT, parser_of

LAUNCH = ROOT / "recipes" / "launch"
PROGRAMS = {
    "scontrol": 'echo "$@" >> asked; if [ "$1" = show ]; then echo node7; echo node8; fi',
    # Ends by itself with the code in `ends`, or when it is stopped, a little later, as a run that saves first does.
    "srun": 'printf "%s\\n" "$@" > started; echo "srun $(grep 123456 started)" >> asked\n'
    'trap "sleep 0.2; echo saved >> asked; exit 143" TERM\n'
    "if [ -e ends ]; then exit $(cat ends); fi; touch running; for i in {1..500}; do sleep 0.05; done",
}


def submitted(folder: Path, *words: str, at_once: int = 600) -> subprocess.Popen[bytes]:
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "4", "CAT_AT_ONCE": str(at_once)}
    environment = os.environ | job | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(["bash", LAUNCH / "slurm.sh", *words], cwd=folder, env=environment)


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_starts_torchrun_and_ends_as_it_does(code: int, tmp_path: Path) -> None:
    (tmp_path / "ends").write_text(str(code))
    job = submitted(tmp_path, "pretrain", "a recipe.yaml", "data.train=x")
    assert job.wait(30) == code
    started = (tmp_path / "started").read_text().splitlines()
    at = started.index("torchrun")
    options = dict(zip(started[at + 1 : -6 : 2], started[at + 2 : -6 : 2], strict=True))
    assert options == {
        **{"--nnodes": "2", "--nproc-per-node": "4", "--rdzv-id": "123456.1"},
        **{"--rdzv-backend": "c10d", "--rdzv-endpoint": "node7:23456"},
    }
    assert started[-6:] == ["-m", "cat", "pretrain", "a recipe.yaml", "data.train=x", "--resume"]
    assert (tmp_path / "asked").read_text() == "show hostnames node[7-8]\nsrun 123456.1\n"  # nothing is queued again


def test_slurm_starts_again_after_an_error_that_did_not_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "ends").write_text("3")
    assert submitted(tmp_path, "pretrain", "recipe.yaml", at_once=0).wait(30) == 3
    assert (tmp_path / "asked").read_text().splitlines()[1:] == [f"srun 123456.{n}" for n in range(1, 6)]


def test_slurm_saves_and_queues_again_when_time_is_up(tmp_path: Path) -> None:
    job = submitted(tmp_path, "pretrain", "recipe.yaml")
    until = time.monotonic() + 30
    while not (tmp_path / "running").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert (tmp_path / "asked").read_text().splitlines()[2:] == ["saved", "requeue 123456"]


def test_slurm_takes_its_options_from_the_head_of_the_script() -> None:
    """sbatch reads them up to the first line that is neither empty nor a comment."""
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    body = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert sum(line.startswith("#SBATCH --") for line in lines[:body]) == sum("#SBATCH" in line for line in lines) > 8


def test_kubernetes_fits_together() -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], service["spec"]["clusterIP"], job["kind"]) == ("Service", "None", "Job")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}  # a label that every Job's pods have
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"  # names the pods
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    args = container["args"]
    at = args.index("-m")
    options = dict(word.removeprefix("--").split("=") for word in args[:at])
    assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, _, port = options["rdzv-endpoint"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert 1024 < int(port) < 65536
    assert args[at : at + 3] == ["-m", "cat", "pretrain"]
    ours = parser_of("pretrain").parse_intermixed_args(args[at + 3 :])
    assert ours.resume
    assert (ROOT / ours.recipe).is_file()
    batch = next(int(word.split("=")[1]) for word in ours.overrides if word.startswith("data.global_batch="))
    assert batch % (int(options["nnodes"]) * int(options["nproc-per-node"])) == 0
    assert all(isinstance(entry["value"], str) for entry in container["env"])  # Kubernetes takes no numbers there


def test_torchrun_knows_the_options_of_the_examples() -> None:
    from torch.distributed.run import get_args_parser

    words = (LAUNCH / "slurm.sh").read_text() + (LAUNCH / "kubernetes.yaml").read_text()
    known = get_args_parser()._option_string_actions
    for name in ("nnodes", "nproc-per-node", "rdzv-id", "rdzv-backend", "rdzv-endpoint"):
        assert words.count(f"--{name}") == 2
        assert f"--{name}" in known
