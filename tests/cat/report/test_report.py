"""`cat-audio report`: what is on the page, and that a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cat.commands import main
from cat.config import ConfigError
from cat.report.curves import charts, thinned
from cat.report.runs import read_runs
from cat.training.finetune import finetune
from cat.training.finetune_recipe import load_finetune_recipe
from cat.training.pretrain import pretrain
from cat.training.recipe import load_recipe

soundfile = pytest.importorskip("soundfile")

MODEL = """
model: {channels: [8, 8], embed_dim: 16, depth: 1, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
features: {frames: 32}
"""
RUN = "run: {threads: 1, log_every: 2, checkpoint_every: 9, device: cpu, tensorboard: false, figures: false}\n"
RECIPE = (
    MODEL
    + "masks: {num_masks: 2}\ndata: {batch_size: 3, num_workers: 0}\noptim: {lr: 3e-3, warmup_steps: 2, steps: 6}\n"
    + RUN
)
# A name that would be markup, and one that would end a script.
NAMES = ("<b>bold</b>", "</script><script>alert(1)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    for part in ("cat", "dog"):
        (folder / "train" / part).mkdir(parents=True)
        for i in range(4):
            loud = (part, i) == ("dog", 1)
            wave = random.standard_normal(5000) * (1e30 if loud else 0.1)
            soundfile.write(folder / "train" / part / f"{part}{i}.wav", wave, 16000, subtype="FLOAT")
    (folder / "minute.yaml").write_text(RECIPE.replace("data: {", f"data: {{train: {folder / 'train'}, "))
    (folder / "tune.yaml").write_text(
        "data: {batch_size: 3, num_workers: 0, valid_share: 0.25}\noptim: {steps: 4, warmup_steps: 0}\n" + MODEL + RUN
    )
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> list[Path]:
    paths = [folder / "runs" / name.replace("/", "∕") for name in NAMES]
    for path, rate in zip(paths, ("3e-3", "1e-3"), strict=True):
        pretrain(load_recipe(folder / "minute.yaml", [f"optim.lr={rate}"]), path, progress=False)
    return paths


@pytest.fixture(scope="module")
def page(folder, runs) -> Path:
    assert main(["report", *map(str, runs), "-o", str(folder / "report.html"), "--samples", "2"]) == 0
    return folder / "report.html"


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_page_has_curves_differences_warnings_and_samples(page, runs):
    data, text = data_of(page), page.read_text()
    assert data["runs"] == [path.name for path in runs]
    titles = [chart["title"] for chart in data["charts"]]
    for title in ("loss, as optimised", "norm of the gradient before clipping", "learning rate", "rate"):
        assert title in titles
    assert "representation regularisation (L_r)" not in titles  # which these runs do not have
    loss = data["charts"][0]
    assert [len(series["points"]) for series in loss["series"]] == [6 - len(loss["marks"][n]["steps"]) for n in (0, 1)]
    assert "<td>optim.lr</td><td>0.003</td><td>0.001</td>" in text
    assert "was skipped: its loss or gradient is not finite" in text
    assert [sample["run"] for sample in data["samples"]] == [0, 0, 1, 1]
    assert all(len(sample["visible"]) == 2 for sample in data["samples"])
    assert data["samples"][0]["audio"].startswith("data:audio/flac;base64,")


def test_names_stay_text_and_nothing_is_loaded(page):
    text = page.read_text()
    assert "<b>bold" not in text
    assert text.count("</script>") == 2
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["']?https?:""", text)


def test_a_run_without_its_data_has_no_samples_but_the_rest(runs, tmp_path, capsys):
    shutil.copytree(runs[0], tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(re.sub(r"train: .*", "train: /gone", config, count=1))
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    assert "note: run: no samples are shown: /gone" in capsys.readouterr().err
    data = data_of(tmp_path / "r.html")
    assert (data["samples"], bool(data["charts"])) == ([], True)


def test_the_data_report_is_shown(runs, folder, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "report.json").write_text('{"format": "cat-audio prepare report", "version": 1}')
    (tmp_path / "report.md").write_text("# What was prepared\n- rejected: 3 <files>\n")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"path": str(folder / "train" / "cat" / "cat0.wav")}) + "\n")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        re.sub(r"train: .*", f"train: {tmp_path / 'manifest.jsonl'}", config, count=1)
    )
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    assert "- rejected: 3 &lt;files&gt;" in (tmp_path / "r.html").read_text()
    assert len(data_of(tmp_path / "r.html")["samples"]) == 1  # there is no other clip
    (tmp_path / "shards").mkdir()  # of `prepare --shards`
    (tmp_path / "run" / "config.yaml").write_text(
        re.sub(r"train: .*", f"train: {tmp_path / 'shards'}", config, count=1)
    )
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html"), "--overwrite"]) == 0
    assert "- rejected: 3 &lt;files&gt;" in (tmp_path / "r.html").read_text()


def test_fine_tuning_runs_have_their_metrics(folder, tmp_path):
    changes = [f"data.train={folder / 'train'}", "encoder=none", "data.valid_share=0.25"]
    finetune(load_finetune_recipe(folder / "tune.yaml", changes), tmp_path / "tune", progress=False)
    assert main(["report", str(tmp_path / "tune"), "-o", str(tmp_path / "r.html"), "--samples", "1"]) == 0
    data = data_of(tmp_path / "r.html")
    titles = [chart["title"] for chart in data["charts"]]
    assert {"loss, as optimised", "validation loss", "validation accuracy"} <= set(titles)
    assert (data["samples"][0]["visible"], data["samples"][0]["labels"]) == ([], ["cat"])


def test_a_file_of_the_users_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("mine")
    assert main(["report", str(runs[0]), "-o", str(tmp_path / "mine.html"), "--samples", "0"]) == 1
    assert "is left alone" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "mine"
    for _ in range(2):  # its own is renewed
        assert main(["report", str(runs[0]), "-o", str(tmp_path / "ours.html"), "--samples", "0"]) == 0


def test_what_is_no_run_is_named(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.yaml; expected the directory of a run"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([runs[0], runs[0].parent / "." / runs[0].name])
    shutil.copytree(runs[0], tmp_path / "other" / runs[0].name)
    names = [run.name for run in read_runs([runs[0], tmp_path / "other" / runs[0].name])]
    assert names == [f"runs/{runs[0].name}", f"other/{runs[0].name}"]


def test_long_curves_are_thinned_and_keep_their_peaks():
    steps, values = np.arange(1, 10_001.0), np.zeros(10_000)
    values[[5, 7_777]] = [np.nan, 100.0]
    points = thinned(steps, values, 100)
    assert len(points) == 100
    assert points[-1][0] == 10_000
    assert max(point[3] for point in points) == 100.0
    assert thinned(steps[:0], values[:0], 100) == []
    assert thinned(steps[:2], np.array([np.nan, 3.0]), 100) == [[2.0, 3.0, 3.0, 3.0]]


def test_rows_that_differ_make_columns_of_one_length(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7, "loss": 1.0, "new": 2.0}\n{"kind": "train", "step": 8, "lo')
    (run,) = read_runs([tmp_path / "run"])
    assert len({len(column) for column in run.columns["train"].values()}) == 1
    assert (run.last_step, run.columns["train"]["new"][-1]) == (7, 2.0)
    assert "new" in [chart["title"] for chart in charts([run])]


# ---------------------------------------------------------------- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Hides the first run, looks under the first mask, and writes down what is seen then.
LOOK = """<script>
const count = (what) => document.querySelectorAll(what).length;
const seen = { curves: count("path.curve"), marks: count(".skipped") };
document.querySelector("#controls input").click();
seen.fewer = count("path.curve");
const canvas = document.querySelector(".picture canvas");
const pixels = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, 64).data.buffer;
const colours = () => new Set(new Uint32Array(pixels())).size;
const all = colours();
[...document.querySelectorAll(".card button")].find((b) => b.textContent === "mask 1").click();
seen.masked = colours() < all;
seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.querySelector("audio").onloadedmetadata = (event) => {
  seen.seconds = event.target.duration;
  document.body.dataset.seen = JSON.stringify(seen);
};
document.querySelector("audio").load();
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 500])
def test_a_browser_draws_it(page, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    (tmp_path / "page.html").write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert not re.search(r"CONSOLE.*(Uncaught|Refused|violates)", done.stderr)
    assert 'data-ready="yes"' in done.stdout
    seen = json.loads(re.search(r'data-seen="(.*?)"', done.stdout)[1].replace("&quot;", '"'))
    data = data_of(page)
    curves = sum(len(chart["series"]) for chart in data["charts"])
    assert (seen["curves"], seen["fewer"]) == (curves, curves // 2)
    assert seen["marks"] == sum(len(mark["steps"]) for mark in data["charts"][0]["marks"])
    assert (seen["masked"], seen["wide"]) == (True, False)
    assert seen["seconds"] == pytest.approx(data["samples"][0]["seconds"], abs=0.01)
