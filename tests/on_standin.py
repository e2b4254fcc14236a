"""For a process of its own: runs on the GPU that is not there (`benchmarks.standin`), and prints as JSON what it found.

python on_standin.py waits       # where operators and a step would wait for a GPU: {name: reason}
python on_standin.py launches    # names of the kernels that `benchmarks.launch` launches
"""

import dataclasses
import json
import sys

from benchmarks import standin

# isort: split
import torch
import triton

LAUNCHED: set[str] = set()
CUDA = torch.device("cuda")


def operators(waits: dict[str, str]) -> None:
    """Every backend of every operator, forward and backward; the first call makes tables and is not looked at."""
    from cat_kernels import backends
    from cat_kernels import spec as S
    from cat_kernels.specs import specs

    for spec in specs():
        for backend in backends.OPERATORS[spec.name]:
            if backends.why_not(spec.name, backend, "cuda") is not None:
                continue
            other = spec.with_backend(backend)
            sample = next(other.samples(CUDA, torch.float32))
            S.run(other, other.operator, sample)
            inputs = S.fresh(sample)
            leaves = S.floats([inputs[name] for name in sample.differentiable])
            with looked_at(other.name, waits):
                outputs = S.floats(other.operator(**inputs))
                if leaves:
                    S.gradients(outputs, leaves, [torch.empty_like(out) for out in outputs])


def seeds(waits: dict[str, str]) -> None:
    """A seed that is an int becomes a tensor on the device."""
    from cat_kernels import restore_tokens

    tokens, visible = torch.randn(1, 2, 8, device=CUDA), torch.zeros(1, 2, dtype=torch.long, device=CUDA)
    for backend in ("triton", "torch"):
        with looked_at(f"restore_tokens[{backend}], seed=5", waits):
            restore_tokens(tokens, visible, 4, 5, backend=backend)


def steps(waits: dict[str, str]) -> None:
    from benchmarks.step_parts import Timer
    from cat.model import CAT, PRESETS, ObjectiveConfig, Regularisation
    from cat.training.optim import OptimConfig
    from cat.training.step import PretrainStep

    for kernels in ("auto", "reference", "dense"):
        config = dataclasses.replace(PRESETS["tiny"], depth=1, kernels=kernels)
        guides = {"a": (Regularisation(2.0, layer=1, schedule="decay", steps=9), 5)}
        model = CAT(config, ObjectiveConfig(global_loss_reduction="mean"), guides=guides).to(CUDA)
        update = PretrainStep(model, OptimConfig(lr=1e-3, warmup_steps=0), precision="bf16")
        spec, visible = torch.randn(2, 1, 32, 128, device=CUDA), torch.zeros(2, 4, dtype=torch.long, device=CUDA)
        batch = (
            spec,
            visible,
            None,
            torch.zeros(2, dtype=torch.long, device=CUDA),
            {"a": torch.randn(2, 5, device=CUDA)},
        )
        update(*batch, lr=1e-3, decay=0.9, weights={"a": 2.0})
        with looked_at(f"step, kernels={kernels}", waits):
            update(*batch, lr=2e-3, decay=0.91, weights={"a": 1.0})
        if kernels == "auto":
            with Timer(CUDA, model), looked_at("step, timed by parts", waits):
                update(*batch, lr=2e-3, decay=0.92, weights={"a": 0.0})


def fine_tuning_steps(waits: dict[str, str]) -> None:
    """With all that a batch goes through on the device."""
    from cat.data import Batch
    from cat.data.augment import Augmentation
    from cat.model import PRESETS, Classifier, HeadConfig
    from cat.training.finetune_step import FinetuneStep
    from cat.training.layerwise import FinetuneOptimConfig
    from cat.training.losses import LossConfig

    model = dataclasses.replace(PRESETS["tiny"], depth=1)
    spans = torch.tensor([[0, 3], [2, 9]])
    drawn = Augmentation(0, torch.rand(2), torch.tensor([[0, 0], [0, 1]]), spans, torch.tensor(0.3), spans, spans)
    heads = {
        "ce": (HeadConfig(), LossConfig(label_smoothing=0.1)),
        "bce": (HeadConfig(loss="bce"), LossConfig("positives")),
        "frames": (HeadConfig("frames", "attention", "bce"), LossConfig("mean")),
    }
    for name, (head, loss) in heads.items():
        step = FinetuneStep(
            Classifier(model, head, 3).to(CUDA), FinetuneOptimConfig(average=0.9), loss, freeze=0, precision="bf16"
        )
        frames = torch.rand(2, 2, 3) if name == "frames" else None
        batch = Batch(
            *(0, torch.randn(2, 1, 32, 128), None, None, None, torch.arange(2), [(), ()], None, []),
            *(torch.rand(2, 3), frames, None if frames is None else torch.ones(2, 2), (1, 2), drawn),
        )
        step(batch.to(CUDA).augmented(), torch.ones(2, 1, 2).to(CUDA), step=0)
        with looked_at(f"fine-tuning step, {name}", waits):
            keep = torch.ones(2, 1, 2).to(CUDA, non_blocking=True)
            step(batch.to(CUDA).augmented(), keep, step=1)


class looked_at:
    """Notes what waits, and goes on."""

    def __init__(self, name: str, waits: dict[str, str]) -> None:
        self.name, self.waits, self.mode = name, waits, standin.gpu(strict=True)

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, kind, error, trace) -> bool:
        self.mode.__exit__(None, None, None)
        self.waits[self.name] = str(error) if kind is standin.Waits else ""
        return kind is standin.Waits


def launches() -> None:
    from benchmarks import launch
    from benchmarks.results import Results

    launch.kernels.reference = lambda kernel: {}
    launch.distance = lambda *args: 0.0
    launch.specification.compare_runs = lambda *args, **options: None
    results = Results()
    launch.run(CUDA, results)
    if results.rejected:
        raise RuntimeError(str(results.rejected))


def main(what: str) -> None:
    standin.install(90)
    triton.JITFunction.run = lambda self, *args, **meta: LAUNCHED.add(self.fn.__name__)  # compiles nothing
    waits: dict[str, str] = {}
    with standin.gpu():
        if what == "waits":
            operators(waits)
            seeds(waits)
            steps(waits)
            fine_tuning_steps(waits)
        else:
            launches()
    print(json.dumps({"waits": waits, "launched": sorted(LAUNCHED)}))


if __name__ == "__main__":
    main(sys.argv[1])
