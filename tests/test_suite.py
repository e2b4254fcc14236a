"""The GPU suite without a GPU: what it runs in which order, what its limits end, what it leaves, what it says at once;
the stand-in for a GPU, and the kernels that are compiled on it."""

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cache, jobs, pieces, plan, suite
from benchmarks.pieces import run_limited
from benchmarks.results import Results, load

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = torch.cuda.is_available()
needs_no_gpu = pytest.mark.skipif(ON_GPU, reason="there is a GPU")


def limited(tmp_path, code, limit_s=60.0):
    """What became of a piece, and the log."""
    with open(tmp_path / "log.txt", "w") as log:
        record = run_limited("piece", [sys.executable, "-c", code], limit_s, log)
    return record, (tmp_path / "log.txt").read_text()


# --- the plan ---------------------------------------------------------------------------------------------------------


def names(found):
    return [piece.name for piece in found]


def test_the_first_to_run_is_what_never_ran_and_the_last_what_takes_longest():
    found = names(plan.pieces("cuda", quick=False))
    assert found[:5] == ["build", "ceilings", "launch", "tests", "tests-alone"]
    first = [found.index(name) for name in ("stem", "step", "graph", "kernels", "operators", "fbank", "memcheck")]
    assert first == sorted(first)
    assert all("compiled" in name for name in found[-3:])
    assert len(set(found)) == len(found)


def test_pieces_are_chosen_by_name_in_the_suites_order():
    found = plan.pieces("cuda", quick=False)
    assert names(plan.chosen(found, [], "on", build=True)) == names(found)
    assert names(plan.chosen(found, ["step", "stem"], "on", build=True)) == ["build", "ceilings", "stem", "step"]
    assert names(plan.chosen(found, [], "only", build=False)) == ["tests", "tests-alone"]
    assert "tests" not in names(plan.chosen(found, [], "off", build=True))
    with pytest.raises(ValueError, match="PIECES names 'stems'; expected some of: build ceilings launch tests"):
        plan.chosen(found, ["stems"], "on", build=True)


def test_tests_share_the_gpu_but_for_those_that_need_it_alone(tmp_path):
    pytest.importorskip("xdist")
    shared, alone = (suite.test_command(p.arguments[0], tmp_path / "x", quick=False) for p in plan.TESTS.values())
    assert shared[shared.index("-n") + 1] == suite.WORKERS
    assert "-n" not in alone
    assert [command[command.index("-m", 3) + 1] for command in (shared, alone)] == [
        "gpu and not alone",
        "gpu and alone",
    ]


@needs_no_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{}"], "No CUDA device is visible to PyTorch here"),
        (["--out", "{}", "--pieces", "stems"], "PIECES names 'stems'"),
        ([], "--out DIR is missing"),
    ],
)
def test_a_suite_that_cannot_run_says_so(tmp_path, arguments, message):
    done = run_suite(*(word.format(tmp_path / "out") for word in arguments))
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_piece_that_hangs_is_interrupted_and_may_say_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "LEAST_S", 1.0)
    code = """
import time
try:
    print("began", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("summary")
"""
    record, log = limited(tmp_path, code, 2.0)
    assert record["status"] == "timed out"
    assert log.split()[-2:] == ["began", "summary"]
    assert record["seconds"] < 2.0 + pieces.GRACE_S


def test_a_piece_that_does_not_heed_is_killed_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "LEAST_S", 1.0)
    monkeypatch.setattr(pieces, "GRACE_S", 1.0)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
time.sleep(60)
"""
    record, log = limited(tmp_path, code, 3.0)
    assert record["status"] == "timed out"
    assert 4.0 <= record["seconds"] < 20.0
    child = int(log.split()[-1])
    for _ in itertools.repeat(None, 50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_piece_that_fails_tells_why(tmp_path):
    failed, _ = limited(tmp_path, "raise SystemExit('no such thing')")
    late, _ = limited(tmp_path, "", 1.0)
    skipped, _ = limited(tmp_path, "print('no such tool'); raise SystemExit(77)")
    assert (failed["status"], failed["reason"]) == ("failed", "exit code 1: no such thing")
    assert (late["status"], late["reason"]) == ("not run", "no time was left")
    assert (skipped["status"], skipped["reason"]) == ("skipped", "no such tool")


# --- what is left, and said -------------------------------------------------------------------------------------------


def options(tmp_path, **changes):
    found = suite.arguments().parse_args(["--out", str(tmp_path), "--device", "cpu", "--quick"])
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_results_are_on_disk_after_every_piece(tmp_path, monkeypatch):
    """So that whatever ends the run loses only the piece that was running."""
    seen = []

    def run_one(wanted, results, scratch, log, *, deadline):
        path = tmp_path / "results.json"
        seen.append(names_of(load(path)) if path.exists() else [])
        results.pieces.append({"name": wanted[0].name, "status": "ok", "seconds": 1.0, "reason": None})

    monkeypatch.setattr(suite, "run_pieces", run_one)
    wanted = plan.chosen(plan.pieces("cpu", quick=True), ["stem", "step"], "on", build=False)
    with open(tmp_path / "log.txt", "w") as log:
        suite.run(wanted, options(tmp_path), Results(), tmp_path, log)
    assert seen == [[], ["ceilings"], ["ceilings", "stem"]]
    assert names_of(load(tmp_path / "results.json")) == ["ceilings", "stem", "step"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json"]


def names_of(data):
    return [piece["name"] for piece in data["pieces"]]


def test_a_suite_goes_on_without_a_build(tmp_path, monkeypatch):
    build = pieces.Piece("build", "", ("-c", "raise SystemExit('error: no compiler')"), 60)
    results = Results()
    with open(tmp_path / "log.txt", "w") as log:
        suite.run([build], options(tmp_path), results, tmp_path, log)
    assert [(p["name"], p["status"], p["reason"]) for p in results.pieces] == [
        ("build", "failed", "exit code 1: error: no compiler")
    ]


def test_what_is_measured_again_takes_the_place_of_what_was():
    row = {"benchmark": "stem", "mode": "forward", "dtype": "bf16", "shape": {"clips": 1}, "median_ms": 2.0}
    results = Results()
    results.merge({"rows": [{**row, "provider": "dense"}, {**row, "provider": "triton"}]})
    results.merge({"rows": [{**row, "provider": "dense", "median_ms": 3.0}, {**row, "provider": "dense compiled"}]})
    found = [(r["provider"], r["median_ms"]) for r in results.rows]
    assert found == [("triton", 2.0), ("dense", 3.0), ("dense compiled", 2.0)]


WAITS = """
import pathlib
import time

def test_fails():
    raise ValueError("seven is not eight")

def test_waits():
    for _ in range(900):
        if pathlib.Path("{go}").exists():
            break
        time.sleep(0.1)
"""


def run_pytest(tmp_path, limit_s, *more):
    go = tmp_path / "go"
    (tmp_path / "test_it.py").write_text(WAITS.format(go=go))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.failures", *more]
    with open(tmp_path / "log.txt", "w") as log:
        record = run_limited("tests", [*command, f"--junitxml={tmp_path / 'x.xml'}", str(tmp_path)], limit_s, log)
    return record, (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_failures_are_said_at_once(tmp_path, monkeypatch, workers):
    """The second test waits for the first one's failure to be said."""
    if workers:
        pytest.importorskip("xdist")
    told = []
    monkeypatch.setattr(pieces, "say", lambda text: told.append(text) or (tmp_path / "go").touch())
    record, _ = run_pytest(tmp_path, 60.0, *workers)
    assert record["status"] == "failed"
    line = told[0]
    assert line.strip().startswith("FAILED ")
    assert line.endswith("test_it.py::test_fails: ValueError: seven is not eight")


def test_each_failure_is_said_once_and_what_is_urgent_at_all(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(pieces, "say", told.append)
    lines = [
        "FAILED a.py::b: no",
        "1 passed",
        "rejected: stem fp32: no",
        "rejected: stem bf16: no",
        "FAILED a.py::b - no",
    ]
    limited(tmp_path, f"print(*{lines}, sep='\\n')")
    assert told == ["  FAILED a.py::b: no", "  rejected: stem fp32: no", "  rejected: stem bf16: no"]


@pytest.mark.slow
def test_on_its_limit_pytest_sums_up(tmp_path):
    record, log = run_pytest(tmp_path, 20.0)
    assert record["status"] == "timed out"
    assert "1 failed" in log
    assert (tmp_path / "x.xml").exists()


@pytest.mark.slow
def test_suite_path_on_the_cpu(tmp_path):
    out = tmp_path / "out"
    done = run_suite("--device", "cpu", "--quick", "--no-build", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert {path.name for path in out.iterdir()} == {"results.json", "log.txt"}
    data = load(out / "results.json")
    status = {piece["name"]: piece["status"] for piece in data["pieces"]}
    if not ON_GPU:
        assert status.pop("memcheck") == "skipped"
    status.pop("launch")  # skipped where the extension is not built
    if importlib.util.find_spec("soundfile") is None:
        assert status.pop("training") == "skipped"
    assert status == dict.fromkeys(status, "ok")
    assert list(status)[:3] == ["ceilings", "tests", "tests-alone"]
    found = {(row["benchmark"], row["mode"], row["provider"]) for row in data["rows"]}
    passes = itertools.product(("dense", "visible", "dense compiled", "visible compiled"), ("forward+backward",))
    assert found >= {("stem", mode, provider) for provider, mode in passes}
    assert found >= {("step", "step", "dense"), ("step", "step", "visible"), ("gather_tokens", "forward", "operator")}
    assert found >= {("stem", "dense forward", "visible"), ("stem sweep", "forward+backward", "visible")}
    assert found >= {("stem resolutions", "forward+backward", "dense"), ("kernels", "norm_linear c=48", "pytorch")}
    assert found >= {("fbank", "log-mel", "torch"), ("features", "model input", "torch")}
    assert data["ceilings"]["copy_GBps"] > 0
    assert done.stdout.index("Pre-training step") > done.stdout.index("operators  ")  # the tables come last
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.report", "--plots", str(out / "results.json")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    drawn = ("stem", "stem-sweep", "stem-resolutions", "step", "kernels", "fbank", "operators")
    assert {path.stem for path in out.glob("*.png")} == set(drawn)


def run_suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.suite", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=450, check=False)


# --- which tests run on a GPU -----------------------------------------------------------------------------------------

WITHOUT_A_GPU = {
    "tests/kernels/test_package.py": "imports, copies and state dicts",
    "tests/kernels/test_resources.py": "reads what compilers say",
    "tests/kernels/test_stem_norm.py": "what PyTorch does on a CPU alone",
    "tests/kernels/test_stem.py": "the stem in plain PyTorch, in float64; test_operators.py runs it on a GPU",
}


def test_every_file_of_kernel_tests_runs_on_a_gpu():
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", "-m", "gpu or either"]
    done = subprocess.run([*command, "tests/kernels"], cwd=ROOT, capture_output=True, text=True, check=False)
    marked = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert marked, done.stdout + done.stderr
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert files - marked == set(WITHOUT_A_GPU)


@needs_no_gpu
def test_a_numpy_under_which_the_interpreter_fails_is_refused():
    code = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda package: {"numpy": "2.4.1", "triton": "3.6.0"}.get(package) or version(package)
import pytest
sys.exit(pytest.main(["--co", "-q", "-p", "no:cacheprovider", "tests/kernels/test_philox.py"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "fails under NumPy 2.4 and newer; install an older one: pip install 'numpy<2.4'" in done.stdout + done.stderr


# --- the stand-in for a GPU -------------------------------------------------------------------------------------------

STANDIN_WORKS = not list((Path(torch.__file__).parent / "lib").glob("libtorch_cuda*"))
needs_standin = pytest.mark.skipif(not STANDIN_WORKS, reason="takes the place of CUDA in a PyTorch built without it")


def on_standin(what):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "on_standin.py"), what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_standin
def test_operators_and_the_step_wait_for_no_gpu():
    """Whatever runs them: a value that is read, or a copy from or to the CPU, would also break a CUDA graph."""
    found = on_standin("waits")["waits"]
    assert {"restore_tokens[torch]", "MultiResConv[dense]", "ema_update_[triton]", "step, kernels=dense"} <= set(found)
    assert {"step, timed by parts", "fine-tuning step, frames"} <= set(found)
    assert {name: reason for name, reason in found.items() if reason} == {}


@needs_standin
def test_the_first_piece_launches_every_kernel():
    from benchmarks import ahead

    modules = [importlib.import_module(name) for name in ahead.modules()]
    listed = {a.kernel.fn.__name__ for module in modules for a in module.ahead("bf16", 90)}
    assert listed <= set(on_standin("launches")["launched"])


# --- compiled kernels, packed -----------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    """Two entries, as another machine's Triton named them."""
    pytest.importorskip("triton")
    made, keys = tmp_path / "made", {"a" * 64: "-one", "b" * 64: "-two"}
    for name, key in keys.items():
        folder = made / cache.folder_of(name)
        folder.mkdir(parents=True)
        (folder / "_k.cubin").write_bytes(key.encode())
        (folder / "_k.json").write_text(json.dumps({"hash": name, "name": "_k"}))
        (folder / "_k.ttir").write_text("what is left out")
        (folder / "__grp___k.json").write_text(json.dumps({"child_paths": {"_k.cubin": "/elsewhere/_k.cubin"}}))
    cache.pack(tmp_path / "packed", made, keys, ["int launch();"], 90)
    return tmp_path / "packed"


def test_unpacked_entries_are_where_this_triton_looks(packed, tmp_path):
    import hashlib

    from triton.runtime.cache import FileCacheManager, triton_key

    with tarfile.open(packed) as archive:
        assert sorted(archive.getnames()) == [f"{i}/_k.{end}" for i in (0, 1) for end in ("cubin", "json")] + [
            "manifest.json"
        ]
    folder = tmp_path / "there"
    told = cache.unpack(packed, folder)
    assert told.startswith(f"{packed}: 2 compiled kernels (2 new) in {folder}")
    assert "(0 new)" in cache.unpack(packed, folder)
    name = hashlib.sha256((triton_key() + "-two").encode()).hexdigest()
    with cache._environment(TRITON_CACHE_DIR=str(folder)):
        group = FileCacheManager(cache.folder_of(name)).get_group("_k.json")
    assert {file: Path(path).parent for file, path in group.items()} == dict.fromkeys(
        ("_k.cubin", "_k.json"), folder / cache.folder_of(name)
    )
    assert Path(group["_k.cubin"]).read_bytes() == b"-two"
    assert json.loads(Path(group["_k.json"]).read_text())["hash"] == name
    assert len(list(folder.iterdir())) == 2


def test_kernels_of_another_triton_are_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "triton_version", lambda: "9.9.0")
    with pytest.raises(ValueError, match=r"was made with Triton .*, and here is 9.9.0.*pip install triton==9.9.0"):
        cache.unpack(packed, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_kernels_for_another_gpu_are_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(
        ValueError, match=r"was made for sm_90, and this GPU is sm_80; make it with make gpu-cache ARCH=80"
    ):
        cache.unpack(packed, tmp_path / "there")


def test_a_damaged_file_of_kernels_is_refused_whole(packed, tmp_path):
    content = packed.read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"no archive"):
        packed.write_bytes(wrong)
        with pytest.raises(ValueError, match="no file of make gpu-cache, or is damaged"):
            cache.unpack(packed, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_entry_goes_nowhere_else(packed, tmp_path):
    manifest, contents = cache._read(packed)
    manifest["entries"][0]["files"] = ["../../_k.cubin"]
    contents["0/../../_k.cubin"] = b""
    with tarfile.open(packed, "w:xz") as archive:
        for name, content in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
            cache._add(archive, name, content)
    with pytest.raises(ValueError, match=r"file '\.\./\.\./_k\.cubin'"):
        cache.unpack(packed, tmp_path / "there")


def test_every_job_is_a_test_file_or_a_piece():
    known = {piece.name: piece for piece in plan.pieces("cuda", quick=False)}
    found = jobs.jobs()
    assert {"launch", "stem", "step", "graph", "kernels", "operators", "memcheck"} <= set(found)
    assert {"tests/kernels/test_operators.py", "tests/kernels/test_stem_mlp_kernel.py"} <= set(found)
    assert all(job in known or (ROOT / job).exists() for job in found)


@pytest.mark.slow
@needs_standin
def test_nothing_is_left_to_compile_after_unpacking(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "packed"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.cache", "make", str(out), "--only", "tests/kernels/test_gather.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.splitlines()
    assert int(first.split()[-4]) > 2  # compiled
    assert last == "cold compiles left: 0"
