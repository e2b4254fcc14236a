"""The model card of a published model: what its checkpoint says, and nothing else.

Of paths, which are somebody's own, only the last name is shown. What is not known is said to be so.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

_RECIPE = ("optim", "objective", "masks", "ema", "loss", "head", "augment")  # sections that say how it was trained
# Beside a checkpoint or in its run: what `finetune` and `evaluate` write.
_SCORES = ("scores.json", "evaluation/*/evaluation.json")


def model_card(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    trained: Mapping[str, Any],
    step: int | None,
    file: Path | None,
    license: str | None,
) -> str:
    """README.md of a model: ``config`` as in config.json, ``trained`` the configuration of its run."""
    classifier = "classes" in config
    header: dict[str, Any] = {"license": license} if license else {}
    header |= {
        "library_name": "cat-kernels",
        "pipeline_tag": "audio-classification" if classifier else "feature-extraction",
        "tags": ["audio", "convolutional-audio-transformer", "arxiv:2601.21612"],
    }
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]),
        "# Convolutional Audio Transformer" + (", a classifier" if classifier else ", an encoder"),
        _model(config, tensors),
        "## Use",
        _use(classifier),
        "## Data",
        _data(trained, classifier),
        "## Recipe",
        _recipe(trained, step),
        "## Scores",
        _scores(file, step),
        "## Licence",
        f"Of the weights: {_quoted(license)}." if license else "Whoever published the weights has named none.",
    ]
    return "\n\n".join(parts) + "\n"


def _model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    model, features = config["model"], config["features"]
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    resolutions = ", ".join(map(str, model["resolutions"]))
    told = (
        f"The encoder of [arXiv 2601.21612](https://arxiv.org/abs/2601.21612): {millions:.2f} M parameters, "
        f"{model['stem']} stem (resolutions {resolutions}), width {model['embed_dim']}, {model['depth']} blocks. It "
        f"hears audio of {features['sample_rate']} Hz as {features['mel_bins']} log-mel bins."
    )
    if "classes" in config:
        names = ", ".join(map(_quoted, config["class_names"][:50]))
        more = len(config["class_names"]) - 50
        told += f"\n\nTask: {config['task']}, {len(config['classes'])} classes: {names}" + (
            f", and {more} more in config.json." if more > 0 else "."
        )
    return told


def _use(classifier: bool) -> str:
    name, result = ("CATClassifier", "prediction") if classifier else ("CATEncoder", "out")
    return f"""\
```python
# pip install 'cat-kernels[hub,train]'
from cat import {name}

model = {name}.from_pretrained("THIS_FOLDER_OR_ITS_NAME_ON_THE_HUB")
{result} = model(waveforms, sample_rate)
```

The encoder also loads without that package, as plain PyTorch:

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(NAME, trust_remote_code=True)
model = AutoModel.from_pretrained(NAME, trust_remote_code=True)
embedding = model(**extractor(waveforms)).pooler_output
```"""


def _data(trained: Mapping[str, Any], classifier: bool) -> str:
    data = trained.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    told = f"Trained on {_name(train)}." if train else "The checkpoint does not say what it was trained on."
    encoder = trained.get("encoder")
    if classifier and encoder:
        told += " From scratch." if encoder == "none" else f" Begun with the encoder of {_name(encoder)}."
    return told


def _recipe(trained: Mapping[str, Any], step: int | None) -> str:
    rows = [("step", step)] if step is not None else []
    for section in _RECIPE:
        rows += _flat(section, trained.get(section))
    keys = (("data", "global_batch"), ("data", "batch_size"), ("run", "seed"), ("run", "precision"))
    for section, key in keys:
        values = trained.get(section)
        if isinstance(values, Mapping) and values.get(key) is not None:
            rows.append((f"{section}.{key}", values[key]))
    if not rows:
        return "The checkpoint does not have it."
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {_quoted(value)} |" for key, value in rows)])


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    elif value is not None:
        yield key, value


def _scores(file: Path | None, step: int | None) -> str:
    """Of the very step only: a run has other checkpoints, with other scores."""
    if file is None or step is None:
        return "The checkpoint has none."
    folders = [file.parent, *([file.parents[2]] if file.parent.parent.name == "checkpoints" else [])]
    rows: list[str] = []
    for written in (path for folder in folders for name in _SCORES for path in sorted(folder.glob(name))):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # nothing to be told
            rows += list(_rows(json.loads(written.read_text(encoding="utf-8")), step))
    if not rows:
        return "None were found beside the checkpoint."
    return "\n".join(["| data | metric | value |", "|---|---|---|", *dict.fromkeys(rows)])


def _rows(found: Mapping[str, Any], step: int) -> Iterator[str]:
    """Of `finetune`'s file (valid, test), or `evaluate`'s (data, metrics)."""
    if found.get("checkpoint", found)["step"] != step:
        return
    named = {split: found.get(split) or {} for split in ("valid", "test")}
    if "metrics" in found:
        named = {PurePath(found["data"]["source"]).name: found["metrics"]}
    for name, values in named.items():
        for metric, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"| {_quoted(name)} | {_quoted(metric)} | {value:.4g} |"


def _name(path: Any) -> str:
    return _quoted(PurePath(str(path)).name)


def _quoted(value: Any) -> str:
    """As code; nothing in it ends a cell or the code."""
    text = " ".join(str(value).replace("`", "'").replace("|", "/").split())
    return f"`{text}`"
