"""`make bench-compare`: what counts as slower, and that a slower call is found."""

import json

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks import bench_calls, regressions
from benchmarks.regressions import changes, confirmed, judge, read_baseline
from cat_kernels.specs import specs

MACHINE = {"machine[copy]": [10.0, 10.1]}


def test_every_operator_and_the_step_are_timed():
    assert {name for name, _, _ in bench_calls.OPERATORS} == {spec.name for spec in specs()}
    assert {mode for _, mode, _ in bench_calls.OPERATORS} == {"forward", "forward+backward"}


@pytest.mark.parametrize(("before", "now", "slower"), [
    ([1.0, 1.01], [1.04, 1.05], False),  # within the margin
    ([1.0, 1.01], [1.08, 1.09], True),
    ([1.0, 1.20], [1.15, 1.16], False),  # the baseline's own processes lay further apart
    ([1.0, 1.01], [1.15, 1.40], False),  # and so do those of now
    ([1.0, 1.01], [1.50, 1.60], True),
    ([1.0, 1.01], [0.5, 0.51], False),
])  # fmt: skip
def test_slower_is_what_lies_beyond_noise_and_margin(before, now, slower):
    found = changes({"gather": before, **MACHINE, "gone": [1.0]}, {"gather": now, **MACHINE, "new": [9.0]}, 0.05)
    assert [c.name for c in found] == ["gather", "machine[copy]"]
    assert found[0].slower == slower
    code, told = judge(found)
    assert code == slower
    assert ("gather" in told) == slower


def test_on_a_slower_machine_nothing_is_said():
    before, now = {"gather": [1.0, 1.0], **MACHINE}, {"gather": [2.0, 2.0], "machine[copy]": [20.0, 20.0]}
    code, told = judge(changes(before, now, 0.05))
    assert code == 2
    assert "machine is slower" in told
    assert "copy" in told


def test_what_seems_slower_is_looked_at_twice():
    before, first = {"gather": [1.0, 1.0], "loss": [1.0, 1.0]}, {"gather": [1.2, 1.2], "loss": [1.2, 1.2]}
    found = confirmed(before, first, {"gather": [1.0, 1.0], "loss": [1.2, 1.2]}, 0.05)
    assert [c.slower for c in found] == [False, True]


def test_a_baseline_of_another_machine_is_refused(tmp_path):
    path = tmp_path / "baseline.json"
    data = regressions.described()
    path.write_text(json.dumps({**data, "times_ms": {"gather": [1.0]}}))
    assert read_baseline(path) == ({"gather": [1.0]}, [])
    path.write_text(json.dumps({**data, "machine": {**data["machine"], "cpu": "Z80"}, "times_ms": {}}))
    with pytest.raises(ValueError, match=r"another machine.*Z80.*--save"):
        read_baseline(path)
    path.write_text(json.dumps({**data, "versions": {**data["versions"], "torch": "1.0"}, "times_ms": {}}))
    assert read_baseline(path)[1] == [f"torch: 1.0 then, {data['versions']['torch']} now"]


def test_a_call_that_takes_longer_is_found(tmp_path, monkeypatch, capsys):
    calls, baseline = tmp_path / "bench_calls.py", tmp_path / "baseline.json"

    def run(*words, ms):
        calls.write_text(
            f"import time\ndef test_operator(benchmark): benchmark(time.sleep, {ms} / 1e3)\n"
            "def test_machine(benchmark): benchmark(time.sleep, 2e-3)\n"
        )
        monkeypatch.setattr(regressions, "CALLS", str(calls))
        words = [
            "regressions",
            "--baseline",
            str(baseline),
            "--runs",
            "1",
            "--seconds",
            "0.05",
            "--margin",
            "0.5",
            *words,
        ]
        monkeypatch.setattr("sys.argv", words)
        return regressions.main(), capsys.readouterr().out

    with pytest.raises(SystemExit):
        run(ms=4)  # there is no baseline
    assert run("--save", ms=4)[0] == 0
    assert run(ms=4)[0] == 0
    code, told = run(ms=12)
    assert code == 1
    assert "slower: operator" in told
    calls.write_text("def test_operator(): raise OSError('no such clip')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["regressions", "--baseline", str(baseline), "--runs", "1"])
        assert regressions.main() == 2
    assert "no such clip" in capsys.readouterr().out
