"""One step of a recipe on a GPU that is not there, traced without data: a process of its own.

Tensors have shapes and no values (PyTorch's FakeTensorMode), and the other processes are PyTorch's fake process group.
The operators are the Triton kernels', by their fake implementations; Triton believes it is to interpret them, since
there is no GPU, and never does. A stem of widths that its kernels do not take runs by PyTorch's operations, of which
there are many: it is traced with a few clips, and what grows with the clips is multiplied.

    python -m cat.training.plan.traced < asked.json     # what `trace` writes; prints what it found as JSON
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat.config import from_mapping, to_mapping
from cat.model import CAT, Classifier, Encoder, ModelConfig, encoder
from cat.parts import part
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.finetune_step import FinetuneStep
from cat.training.recipe import PretrainConfig

ROOT = Path(__file__).parents[3]
FEW = 2  # clips of a step that PyTorch's operations run
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TraceError(RuntimeError):
    """A step could not be traced here."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """What a step of one process needs. Bytes, unless it says something else."""

    trained: int  # parameters that have a gradient
    weights: int  # parameters and buffers, and the teacher's copy in low precision
    checkpoint: int  # without the optimiser's moments
    peak: int  # of what the step makes, at its worst moment
    at_peak: dict[str, int]  # the same by part of the step that made it
    flops: dict[str, int]  # by part of the step
    moved: int  # read and written by operations, each operator of ours as one
    operations: int
    gradients: int  # that a process hands to the others; 0 where it is alone


def trace(
    config: PretrainConfig | FinetuneConfig, *, clips: int, processes: int, precision: str, dims: dict[str, int]
) -> Traced:
    """Forward and backward of ``clips`` clips in one of ``processes`` processes.

    precision: "fp32", "bf16" or "fp16". dims: widths of external embeddings by guide, "" for the objective's.

    Raises: `TraceError`.
    """
    asked = {
        "kind": "pretrain" if isinstance(config, PretrainConfig) else "finetune",
        "config": to_mapping(config),
        **{"clips": clips, "processes": processes, "precision": precision, "dims": dims},
    }
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "cat.training.plan.traced"],
        input=json.dumps(asked),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TraceError(f"the step could not be traced: {said[-1]}")
    return Traced(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    asked = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # it draws until all values fit, and here there are none
    encoder.FEW_TOKENS = 0  # attention in float32 is for CPUs
    kind = PretrainConfig if asked.pop("kind") == "pretrain" else FinetuneConfig
    config: Any = from_mapping(kind, asked.pop("config"), source="the recipe")
    print(json.dumps(dataclasses.asdict(_as_on_a_gpu(config, **asked))))


def _as_on_a_gpu(config: Any, clips: int, **asked: Any) -> Traced:
    """By the kernels that ``model.kernels: auto`` takes there."""
    fused = _is_fused(config.model)
    model = dataclasses.replace(config.model, kernels="triton" if fused else "reference")
    few = clips if fused else min(clips, FEW)
    found = _traced(dataclasses.replace(config, model=model), few, **asked)
    grown = {name: getattr(found, name) * clips // few for name in ("peak", "moved")}
    grown |= {
        name: {part: count * clips // few for part, count in getattr(found, name).items()}
        for name in ("at_peak", "flops")
    }
    return dataclasses.replace(found, **grown)


def _is_fused(model: ModelConfig) -> bool:
    from cat_kernels.stem.fused import why_not_fused

    if model.stem != "multires":
        return True
    with torch.device("meta"):
        stem: Any = Encoder(model).stem
    return why_not_fused(stem, torch.bfloat16) is None


def _traced(config: Any, clips: int, processes: int, precision: str, dims: dict[str, int]) -> Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cat.training.plan.watch import Watch

    make = _pretraining if isinstance(config, PretrainConfig) else _finetuning
    sent: list[int] = []
    watch = Watch()
    with _fake_group(processes), FakeTensorMode(allow_non_fake_inputs=True):
        model, loss = make(config, clips, precision, dims, lambda whole: _shared(whole, processes, sent))
        with watch.watching():
            low = torch.autocast("cpu", PRECISIONS.get(precision), enabled=precision in PRECISIONS)
            with low, part("forward"):
                result = loss()
            with part("backward"):
                result.backward()
            del result
        weights: dict[int, int] = {}
        lowered = [copied for own in getattr(model, "_low", ()) for copied in own.parameters()]
        for tensor in (*model.parameters(), *model.buffers(), *lowered):
            weights[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return Traced(
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=sum(weights.values()),
            checkpoint=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
            peak=watch.peak_bytes,
            at_peak={name: size for name, size in watch.at_peak.most_common() if size},
            flops={name: count for name, count in watch.flops.most_common() if count},
            moved=watch.bytes,
            operations=watch.operations,
            gradients=sum(sent),
        )


@contextlib.contextmanager
def _fake_group(processes: int) -> Iterator[None]:
    """The default process group, whose other members are not there."""
    if processes == 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _shared(model: nn.Module, processes: int, sent: list[int]) -> nn.Module:
    """The model in DDP, which notes the bytes of gradients that it hands on."""
    if processes == 1:
        return model

    def noted(noting, bucket):  # without types: DDP compares annotations, which are strings here
        noting.append(bucket.buffer().nbytes)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    # init_sync and buffers would compare and send values, of which there are none.
    ddp = nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
    )
    ddp.register_comm_hook(sent, noted)
    return ddp


Share = Callable[[nn.Module], nn.Module]


def _pretraining(
    config: PretrainConfig, clips: int, precision: str, dims: dict[str, int], share: Share
) -> tuple[nn.Module, Callable[[], Tensor]]:
    from cat.data.masks import inverse_block_masks

    guides = {name: (guide, dims[name]) for name, guide in config.guides.items()}
    model = CAT(config.model, config.objective, dims.get(""), guides).train()
    if precision in PRECISIONS:
        model.lower_teacher(PRECISIONS[precision])
    shared = share(model)
    features, masks = config.features, config.masks
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        one = inverse_block_masks(masks, config.grid, seed=0, step=0, clips=torch.zeros(1, dtype=torch.int64))
    spec = torch.zeros(clips, 1, features.frames, features.mel_bins)
    visible = torch.zeros(clips * masks.num_masks, one.shape[1], dtype=torch.int64)
    rows = {name: torch.zeros(clips, dim) for name, dim in dims.items()}
    embedding = rows.pop("", None)
    weights = {name: torch.zeros(()) for name, term in model.terms.items() if term.scheduled}
    rng = torch.zeros(2, dtype=torch.int64)
    return model, lambda: shared(spec, visible, embedding, rng=rng, guides=rows, weights=weights).loss


def _finetuning(
    config: FinetuneConfig, clips: int, precision: str, dims: dict[str, int], share: Share
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Of clips that are all ``features.frames`` long."""
    from cat.data import Batch

    classes, features, H = len(config.classes), config.features, config.features.frames // config.model.patch_size
    model = Classifier(config.model, config.head, classes)
    step = FinetuneStep(model, config.optim, config.loss, freeze=config.freeze)
    step.train_mode()
    shared = share(model)
    keep = torch.ones(clips, config.model.depth, 2) if config.optim.drop_path else None
    events = config.task == "events"
    batch = Batch(
        step=0,
        spec=torch.zeros(clips, 1, features.frames, features.mel_bins),
        waveform=None,
        lengths=None,
        visible=None,
        embedding=None,
        clips=torch.zeros(clips, dtype=torch.int64),
        labels=[],
        failures=[],
        targets=torch.zeros(clips, classes),
        frame_targets=torch.zeros(clips, H, classes) if events else None,
        frame_weights=torch.zeros(clips, H) if events else None,
    )

    def loss() -> Tensor:
        output = shared(batch.spec, rows=None, keep=None if config.freeze == "encoder" else keep)
        total, count = step.losses(output, batch, config.loss.label_smoothing)
        return total / count

    return model, loss


if __name__ == "__main__":
    main()
