"""The arithmetic of a plan: from what a traced step needs, and a GPU's numbers, to memory, hours, cores and disk.

Nothing here was measured on a GPU. What is a guess is called one, by a name below that says what it rests on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cat.data.share import Share
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.plan.hardware import Machines
from cat.training.plan.reading import Reading
from cat.training.plan.told import Line, Plan, Section, gib, number
from cat.training.plan.traced import Traced
from cat.training.recipe import PretrainConfig

# Of the datasheet's rates, what a large product and a large copy reach: measured on an H200.
MATRIX_SHARE, COPY_SHARE = 0.8, 0.9
# A step against the sum of its products at that rate and its bytes at that: so that the base model's at 96 clips on an
# H200 is what `benchmarks.predict` says, 128 ms, a prediction itself.
SLOWER = 1.25
FP32_SHARE = 1 / 16  # of the matrix rate, without matrix units
HOST_US = 8.0  # the CPU's for one operation: a step is never shorter than its operations
UPDATE_BYTES = 58  # a trained parameter: clipping, AdamW and the average, counted on a traced step
CONTEXT_BYTES = int(1.0 * 2**30)  # CUDA's and its libraries'
GROUP_BYTES = int(0.5 * 2**30)  # NCCL's buffers
FRAGMENTS = 0.08  # of the allocator, above what is alive
BUCKET_BYTES = 25 << 20  # of DDP; the last one is sent when the backward has ended
ROW_BYTES = {"pretrain": 330, "finetune": 130}  # of metrics.jsonl, an update


@dataclass(frozen=True)
class Case:
    """What is planned: a recipe in so many processes, and what was found out about its step and its data."""

    config: PretrainConfig | FinetuneConfig
    machines: Machines
    share: Share
    traced: Traced
    precision: str
    begun: int = 0  # updates that are done
    clips: int | None = None  # of an epoch
    valid: int = 0  # clips of the validation data
    reading: Reading | None = None

    @property
    def steps(self) -> int:
        return max(0, self.config.end - self.begun)


def estimated(case: Case, free: int | None) -> Plan:
    """``free``: bytes, where the run will be."""
    what = "pretrain" if isinstance(case.config, PretrainConfig) else "finetune"
    title = f"plan: {what} {case.config.run.name} on {case.machines.told()}; estimated, nothing was started"
    return Plan(title, [batch(case), memory(case), time(case), loader(case), disk(case, free)])


def batch(case: Case) -> Section:
    share, machines, data = case.share, case.machines, case.config.data
    at_once = f"pieces of {share.size}, at most data.batch_size={data.batch_size} at once"
    lines = [
        Line("an update", share.clips, "clips", "data.global_batch, or data.batch_size where that is null"),
        Line("a GPU", share.clips // machines.processes, "clips", f"{share.clips} / {machines.processes} processes"),
        Line("pieces", share.own, "", f"{at_once}; their gradients are added up"),
        Line("steps", case.steps, "", f"{case.config.end} of the recipe, {case.begun} done"),
    ]
    if case.clips:
        seen = case.steps * share.clips
        lines.append(Line("epochs", seen / case.clips, "", f"{seen:,} clips / {case.clips:,} of an epoch"))
    return Section("batch", lines)


# ---------------------------------------------------------------- memory


def fixed_bytes(case: Case) -> int:
    """Of a GPU, whatever the batch."""
    group = GROUP_BYTES if case.machines.processes > 1 else 0
    return case.traced.weights + 12 * case.traced.trained + CONTEXT_BYTES + group


def memory(case: Case) -> Section:
    traced, machines, size = case.traced, case.machines, case.share.size
    trained = f"{traced.trained / 1e6:.2f} M trained"
    inputs = 2 * size * _input_bytes(case)
    several = machines.processes > 1
    alive = traced.weights + 12 * traced.trained + traced.peak + inputs
    overhead = CONTEXT_BYTES + (GROUP_BYTES if several else 0)
    needed = int(alive * (1 + FRAGMENTS)) + overhead
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in traced.at_peak.items() if size >= 2**28)
    card = machines.card
    return Section(
        "memory of a GPU",
        [
            Line("weights", traced.weights, "B", f"{trained}, and what is averaged; fp32, and copies in {_low(case)}"),
            Line("AdamW", 8 * traced.trained, "B", f"two moments: 8 bytes x {trained}"),
            Line("gradients", 4 * traced.trained, "B", f"4 bytes x {trained}"),
            Line("activations", traced.peak, "B", f"{size} clips, traced without a GPU (GiB: {parts or 'little'})"),
            Line("inputs", inputs, "B", f"2 batches x {size} clips x {_input_bytes(case):,} bytes"),
            Line("fragments", int(alive * FRAGMENTS), "B", f"{FRAGMENTS:.0%} of what is above", guess=True),
            Line("context", overhead, "B", f"CUDA{' and NCCL' * several}", guess=True),
            Line("in all", needed, "B", f"{needed / 2**30 / card.memory_GiB:.0%} of {card.memory_GiB} GiB"),
        ],
    )


def most_clips(case: Case) -> int:
    """Of a piece that fits into the GPU's memory, as far as it grows with the clips."""
    room = case.machines.card.memory_GiB * 2**30 - CONTEXT_BYTES - GROUP_BYTES * (case.machines.processes > 1)
    fixed = case.traced.weights + 12 * case.traced.trained
    a_clip = case.traced.peak / case.share.size + 2 * _input_bytes(case)
    return max(0, math.floor((room / (1 + FRAGMENTS) - fixed) / a_clip))


def _input_bytes(case: Case) -> int:
    """Of a clip: its waveform, and its spectrogram in fp32."""
    features = case.config.features
    return 2 * features.samples + 4 * features.frames * features.mel_bins


def _waiting_bytes(case: Case) -> int:
    """The same as data workers hand it on: the one or the other."""
    features = case.config.features
    made = case.config.data.features == "cpu"
    return 4 * features.frames * features.mel_bins if made else 2 * features.samples


def _low(case: Case) -> str:
    return case.precision if case.precision != "fp32" else "none"


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Times:
    """Seconds."""

    piece: float  # forward and backward of one, or as measured
    update: float  # clipping, AdamW, average; 0 where it is in what was measured
    sent: float  # gradients to all processes
    backward: float  # of a piece
    exposed: float  # of `sent`, what no backward hides
    measured: bool

    def step(self, pieces: int) -> float:
        return pieces * self.piece + self.exposed + self.update


def times(case: Case) -> Times:
    traced, machines, card = case.traced, case.machines, case.machines.card
    rate = card.matrix_TFLOPS * 1e12 * MATRIX_SHARE * (1 if case.precision != "fp32" else FP32_SHARE)
    copied = card.bandwidth_TBps * 1e12 * COPY_SHARE
    flops = sum(traced.flops.values())
    on_gpu = SLOWER * (flops / rate + traced.moved / copied)
    measured = machines.step_ms > 0
    piece = machines.step_ms / 1e3 if measured else max(on_gpu, traced.operations * HOST_US / 1e6)
    update = 0.0 if measured else UPDATE_BYTES * traced.trained / copied
    backward = piece * traced.flops.get("backward", 0) / max(flops, 1)
    R = machines.processes
    sent = 2 * (R - 1) / R * traced.gradients / (machines.ring_GBps * 1e9)
    last = 2 * (R - 1) / R * min(BUCKET_BYTES, traced.gradients) / (machines.ring_GBps * 1e9)
    return Times(piece, update, sent, backward, max(last, sent - backward), measured)


def time(case: Case) -> Section:
    traced, card, found = case.traced, case.machines.card, times(case)
    flops, pieces = sum(traced.flops.values()), case.share.own
    step = found.step(pieces)
    rate = card.matrix_TFLOPS * MATRIX_SHARE
    how = f"{SLOWER} x ({flops / 1e12:.1f} TFLOP / {rate:.0f} a second + {traced.moved / 1e9:.0f} GB / "
    how += f"{card.bandwidth_TBps * COPY_SHARE:.2f} TB/s)"
    if found.measured:
        how = "step_ms, as measured"
    elif case.precision == "fp32":
        how += f", products at {FP32_SHARE:g} of that in fp32"
    together = " + ".join(
        f"{1e3 * seconds:.1f}"
        for seconds in (pieces * found.piece, found.exposed, found.update)
        if seconds and 1e3 * seconds >= 0.05
    )
    hours, guess = case.steps * step / 3600, not found.measured
    lines = [
        Line("a piece", 1e3 * found.piece, "ms", how, guess=guess),
        *_sending(case, found),
        Line("an update", 1e3 * step, "ms", f"{together} ms; where nothing waits for data", guess=guess),
        Line("rate", case.share.clips / step, "clips/s", f"{case.share.clips} clips / {step:.3g} s", guess=guess),
        Line("of the matrix rate", _share_of_rate(case, step), "%", f"of {card.matrix_TFLOPS:g} TFLOP/s", guess=guess),
        Line("training", hours, "h", f"{case.steps:,} steps x {step:.3g} s", guess=guess),
    ]
    if seconds := _evaluating(case, found):
        lines.append(Line("evaluations", seconds / 3600, "h", _evaluations(case), guess=True))
    return Section("time", [*lines, _gpu_hours(case, hours + seconds / 3600)])


def _sending(case: Case, found: Times) -> list[Line]:
    machines, size = case.machines, case.traced.gradients
    R = machines.processes
    if R == 1:
        return []
    over = f"{machines.ring_GBps:g} GB/s ({machines.joined_by})"
    least = 2 * (R - 1) / R * size / found.backward / 1e9 if found.backward else 0.0
    hidden = f"behind the backward of {1e3 * found.backward:.0f} ms"
    return [
        Line("gradients", 1e3 * found.sent, "ms", f"2 x {R - 1}/{R} x {gib(size)} / {over}", guess=True),
        Line("not hidden", 1e3 * found.exposed, "ms", f"{hidden}; the last bucket never is", guess=True),
        Line("bandwidth to hide", least, "GB/s", f"what a GPU must send and receive for that {hidden}"),
    ]


def _share_of_rate(case: Case, step: float) -> float:
    return 100 * case.share.own * sum(case.traced.flops.values()) / step / (case.machines.card.matrix_TFLOPS * 1e12)


def _evaluating(case: Case, found: Times) -> float:
    """Seconds of all evaluations: a clip's forward in every process."""
    forward = (found.piece - found.backward) / case.share.size
    return _count_evaluations(case) * case.valid / case.machines.processes * forward


def _evaluations(case: Case) -> str:
    return f"{_count_evaluations(case):,} x {case.valid:,} clips, the forward of a step"


def _count_evaluations(case: Case) -> int:
    run = case.config.run
    return case.steps // (run.eval_every or run.checkpoint_every) if case.valid else 0


def _gpu_hours(case: Case, hours: float) -> Line:
    R = case.machines.processes
    how = f"{number(hours)} h x {R}"
    return Line("GPU hours", hours * R, "", how, guess=not case.machines.step_ms)


# ---------------------------------------------------------------- data


def loader(case: Case) -> Section:
    machines, data, found = case.machines, case.config.data, case.reading or Reading.assumed()
    rate = case.share.clips / times(case).step(case.share.own) / machines.nodes
    cores = rate * found.seconds
    piece = case.share.size * _waiting_bytes(case)
    guess, each = not found.measured, f"{1e3 * found.seconds:.3g} ms"
    waiting = machines.gpus * data.num_workers * data.prefetch * piece
    return Section(
        "loader of a node",
        [
            Line("a clip", 1e3 * found.seconds, "ms of a core", found.told, guess=guess),
            Line("clips", rate, "clips/s", f"the rate / nodes ({machines.nodes})"),
            Line("cores", cores, "", f"{number(rate)} clips/s x {each}", guess=guess),
            Line("workers", machines.gpus * data.num_workers, "", f"{machines.gpus} GPUs x data.num_workers"),
            Line("read", rate * found.bytes / 1e6, "MB/s", f"{found.bytes:,.0f} bytes a clip", guess=guess),
            Line("waiting batches", waiting, "B", f"workers x data.prefetch={data.prefetch} x {piece:,} bytes, in RAM"),
        ],
    )


# ---------------------------------------------------------------- disk


def checkpoint_bytes(case: Case) -> int:
    return case.traced.checkpoint + 8 * case.traced.trained


def disk(case: Case, free: int | None) -> Section:
    run, size = case.config.run, checkpoint_bytes(case)
    kept = run.keep_last + run.keep_best + 1 + (case.steps // run.keep_every if run.keep_every else 0)
    rows = ROW_BYTES["pretrain" if isinstance(case.config, PretrainConfig) else "finetune"]
    moments = f"8 bytes x {case.traced.trained / 1e6:.2f} M"
    lines = [
        Line("a checkpoint", size, "B", f"model {gib(case.traced.checkpoint)} + moments {moments}"),
        Line("checkpoints", kept * size, "B", f"{kept}: run.keep_last, keep_best, keep_every, and one being written"),
        Line("written", case.steps // run.checkpoint_every * size, "B", "of all checkpoints, over the whole run"),
        Line("metrics", rows * case.steps, "B", f"{rows} bytes x {case.steps:,} steps", guess=True),
    ]
    if free is not None:
        lines.append(Line("free", free, "B", f"where {case.config.run.dir} is"))
    return Section("disk", lines)
