"""A whole fine-tuning step of the AudioSet-20k recipe: features of waveforms, mixup and SpecAugment, classifier with
drop path, loss, backward, AdamW by layers.

    python -m benchmarks.finetune                  # one clip on a CPU, the recipe's 48 on a GPU; base model
    python -m benchmarks.finetune --clips 8 --out finetune.json

Candidates, by `model.kernels` of a recipe: "dense" has the stem as its formula reads, "visible" in plain PyTorch with
all patches visible, "triton" in Triton kernels (auto; on a GPU). All else is the same code.

Shapes: B clips, n samples, T frames, C classes.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.fbank import waveforms
from benchmarks.flops import multiply_adds
from benchmarks.results import Key, Results
from benchmarks.runner import (
    Case,
    Groups,
    Settings,
    arguments,
    finish,
    floor_ms,
    run_case,
    say,
    skipped_dtypes,
    speedup_line,
    unsearched,
)
from benchmarks.stem import eager, largest_batch
from benchmarks.step_time import kernels
from cat.data.augment import AugmentConfig, draw
from cat.data.batch import Batch
from cat.data.features import FeatureConfig
from cat.model import PRESETS, Classifier, HeadConfig
from cat.training.drop_path import drop_path_factors
from cat.training.finetune_step import FinetuneStep
from cat.training.layerwise import FinetuneOptimConfig
from cat.training.losses import LossConfig

CLASSES = 527  # of AudioSet
POSITIVES = 3  # labels of a clip, about as many as there
REFERENCE_CLIPS = 4  # the reference goes through the batch in pieces of so many clips
LOSS = LossConfig(over="positives")
# So small a rate that a hundred steps on random numbers change nothing that is measured.
OPTIM = FinetuneOptimConfig(lr=1e-7, min_lr=0, warmup_lr=0, warmup_steps=0, layer_decay=0.65, drop_path=0.1)
AUGMENT = AugmentConfig(mixup=0.8, mixup_probability=1.0, mask_bins=0.2, mask_frames=0.2)


def build_model(preset: str, kernels: str) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = dataclasses.replace(PRESETS[preset], kernels=kernels)
        return Classifier(config, HeadConfig(loss="bce"), CLASSES).train()


def inputs(shape: dict[str, Any], device: torch.device) -> tuple[Batch, Tensor]:
    """A batch of waveforms with labels and what is drawn for it, and the factors of drop path."""
    B, T = shape["clips"], shape["frames"]
    generator = torch.Generator().manual_seed(4)
    targets_BC = torch.zeros(B, CLASSES)
    targets_BC.scatter_(1, torch.rand(B, CLASSES, generator=generator).topk(POSITIVES, dim=1).indices, 1.0)
    wave_BN = waveforms(B, T, torch.device("cpu"))
    batch = Batch(
        step=0,
        spec=None,
        waveform=wave_BN,
        lengths=torch.full((B,), wave_BN.shape[1]),
        visible=None,
        clips=torch.arange(B),
        labels=[()] * B,
        embedding=None,
        failures=[],
        targets=targets_BC,
        augmentation=draw(AUGMENT, FeatureConfig(), seed=0, step=0, epochs=[0] * B, clips=range(B), frames=[T] * B),
    )
    keep = drop_path_factors(OPTIM.drop_path, PRESETS[shape["preset"]].depth, B, seed=0, step=0)
    return batch.to(device), keep.to(device)


class FinetuneProvider:
    """A step: ``name`` says which kernels run it."""

    def __init__(self, name: str, shape: dict[str, Any], dtype: str, device: torch.device) -> None:
        if dtype == "fp16":
            raise ValueError("fine-tuning runs in fp32 or bf16")
        self.model = build_model(shape["preset"], kernels(name)).to(device)
        self.step = FinetuneStep(self.model, OPTIM, LOSS, precision=dtype)
        self.batch, self.keep = inputs(shape, device)
        self.features = dataclasses.replace(FeatureConfig(), frames=shape["frames"])
        self._make_optimizer_state()

    def _make_optimizer_state(self) -> None:
        """So that it counts as what stays, not as what a step takes."""
        for p in self.step.parameters.values():
            p.grad = torch.zeros_like(p)
        self.step.optimizer.step()
        self.step.optimizer.zero_grad(set_to_none=True)

    def input(self) -> Batch:
        return self.batch.with_features(self.features).augmented()

    def call(self) -> Tensor:
        return self.step(self.input(), self.keep, step=0)

    def check(self) -> Groups:
        batch = self.input()
        total, count = self.step.losses(self.step.outputs(batch, self.keep), batch)
        loss = total / count
        loss.backward()
        found = {"loss": [loss.detach()], "gradients": [p.grad for p in self.step.parameters.values()]}
        self.step.optimizer.zero_grad(set_to_none=True)
        return found

    def persistent_bytes(self) -> int:
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [t for state in self.step.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in held)


def make_provider(name: str, shape: dict[str, Any], dtype: str) -> FinetuneProvider:
    """For the process that measures memory on a CPU."""
    return FinetuneProvider(name, shape, dtype, torch.device("cpu"))


def reference(shape: dict[str, Any], device: torch.device) -> Groups:
    """Loss and gradients in float32, a few clips at a time (see `stem.reference`)."""
    provider = FinetuneProvider("visible", shape, "fp32", device)
    batch, total = provider.input(), torch.zeros((), device=device)
    count = batch.targets.sum()
    for clips in torch.arange(shape["clips"]).split(REFERENCE_CLIPS):
        piece = slice(int(clips[0]), int(clips[-1]) + 1)
        part = dataclasses.replace(batch, spec=batch.spec[piece], targets=batch.targets[piece])
        loss = provider.step.losses(provider.step.outputs(part, provider.keep[piece]), part)[0] / count
        loss.backward()
        total += loss.detach()
    return {"loss": [total], "gradients": [p.grad for p in provider.step.parameters.values()]}


def count(shape: dict[str, Any], name: str) -> int:
    """Multiply-adds of a step with its backward, per clip."""
    with torch.device("meta"):
        model = build_model(shape["preset"], "dense" if kernels(name) == "dense" else "reference")
        spec = torch.empty(1, 1, shape["frames"], model.encoder.config.mel_bins)
    return multiply_adds(lambda: model(spec).clip.sum().backward())


def case(shape: dict[str, Any], dtype: str, names: tuple[str, ...], s: Settings) -> Case:
    work = {}
    for name in names:
        total = count(shape, name) * shape["clips"]
        work[name] = {"multiply_adds": total, "floor_ms": floor_ms(total, dtype, s.ceilings)}
    peak = None
    if s.device.type == "cpu" and s.memory:
        peak = lambda name: memory.peak_in_fresh_process(  # noqa: E731
            "finetune", {"name": name, "shape": shape, "dtype": dtype}, threads=s.threads
        )
    return Case(
        key=Key(benchmark="fine-tuning", mode="step", dtype=dtype, shape=shape),
        providers={name: lambda name=name: FinetuneProvider(name, shape, dtype, s.device) for name in names},
        baseline="dense" if "dense" in names else names[0],
        reference=lambda: reference(shape, s.device),
        work=work,
        peak=peak,
    )


def fits(shape: dict[str, Any], dtype: str, device: torch.device) -> bool:
    """Whether the dense candidate has the memory for this batch, with the others' weights beside it."""
    try:
        others = [FinetuneProvider("visible", {**shape, "clips": 2}, dtype, device) for _ in range(3)]
        with unsearched():
            for provider in (*others, FinetuneProvider("dense", shape, dtype, device)):
                provider.call()
    except RuntimeError:  # libraries that lack memory do not all raise OutOfMemoryError
        return False
    return True


def run(s: Settings) -> Results:
    results = Results()
    skipped_dtypes(s, results)
    names = eager(s.device)
    shape = {"preset": s.preset, "clips": s.clips, "frames": s.frames}
    for dtype in s.dtypes:
        if dtype == "fp16":
            continue
        clips = largest_batch(shape, lambda sh, dtype=dtype: fits(sh, dtype, s.device), s.device)
        run_case(case({**shape, "clips": clips}, dtype, names, s), results, s)
        if clips != s.clips:
            results.notes.append(
                f"fine-tuning {dtype}: the dense stem has no memory for {s.clips} clips; compared at {clips}"
            )
            run_case(case(shape, dtype, names[1:], s), results, s)
    return results


def main() -> int:
    s = Settings.of(arguments(__doc__.splitlines()[0]).parse_args(), clips_cpu=2, clips_cuda=48)
    results = run(s)
    for c in results.comparisons:
        say(speedup_line(c))
    return finish(results, s, [])


if __name__ == "__main__":
    sys.exit(main())
