"""The pieces of the GPU suite, in the order in which they run, and which of them were asked for."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.pieces import Piece

BUILD = Piece("build", "", ("setup.py", "build_ext", "--inplace"), 120)

# In two parts: what shares the GPU, and what needs it alone.
TESTS = {
    "tests": Piece("tests", "", ("gpu and not alone",), 240),
    "tests-alone": Piece("tests-alone", "", ("gpu and alone",), 90),
}


def pieces(device: str, *, quick: bool) -> list[Piece]:
    """All of a run, the most wanted first: time that runs out is taken from the last. What has never run on a GPU and
    ends soonest comes first; compilers, which take longer than all else, come last."""
    on = ("--device", device)
    if quick:
        on += ("--clips", "1", "--dtypes", "fp32", "--budget", "0.1", "--min-rounds", "1", "--no-memory")
        tiny = ("--preset", "tiny", "--frames", "64", "--masks", "2")
        few = ("--only", "gather_tokens,masked_regression_loss")
        other = ("--sweep", "1", "2", "--resolutions", "4,16")
        return [
            BUILD,
            Piece("ceilings", "ceilings", ("--device", device, "--quick")),
            Piece("launch", "launch", ("--device", device)),
            *TESTS.values(),
            Piece("fbank", "fbank", (*on, *tiny, "--compiled", "--compiler", "aot_eager")),
            Piece("memcheck", "sanitize", ("--tool", "memcheck")),
            Piece("stem", "stem", (*on, *tiny, "--compiled", "--compiler", "aot_eager")),
            Piece("step", "step_time", (*on, *tiny, "--cases", "eager")),
            Piece("parts", "step_parts", (*on, *tiny)),
            Piece("kernels", "kernels", (*on, *tiny, "--only", "norm_linear")),
            Piece("finetune", "finetune", (*on, *tiny)),
            Piece("inference", "inference", (*on, "--preset", "tiny", "--frames", "64", "--batches", "1")),
            Piece("training", "scaling", (*on, *tiny, "--clips", "2", "--updates", "4", "--processes", "1")),
            Piece("sweep", "stem", (*on, *tiny, *other)),
            Piece("operators", "operators", (*on, *few)),
        ]
    bf16 = ("--dtypes", "bf16")
    eager = (*on, "--no-compiled")
    return [
        BUILD,
        Piece("ceilings", "ceilings", on, 40),
        Piece("launch", "launch", on, 60),
        *TESTS.values(),
        Piece("stem", "stem", (*eager, *bf16, "--budget", "2"), 60),
        Piece("step", "step_time", (*eager, *bf16, "--budget", "3", "--cases", "eager"), 80),
        Piece("graph", "step_time", (*eager, *bf16, "--budget", "2", "--cases", "graph"), 60),
        Piece("parts", "step_parts", (*on, *bf16), 60),
        Piece("kernels", "kernels", (*on, *bf16), 60),
        Piece("operators", "operators", (*eager, "--dtypes", "bf16,fp32"), 60),
        Piece("fbank", "fbank", (*eager, "--dtypes", "fp32,bf16", "--budget", "2"), 60),
        Piece("finetune", "finetune", (*eager, *bf16, "--budget", "2"), 60),
        Piece("inference", "inference", (*eager, *bf16, "--budget", "2"), 60),
        Piece("training", "scaling", (*on, *bf16), 100),
        Piece("memcheck", "sanitize", ("--tool", "memcheck"), 90),
        Piece("initcheck", "sanitize", ("--tool", "initcheck"), 90),
        Piece("racecheck", "sanitize", ("--tool", "racecheck"), 60),
        Piece("synccheck", "sanitize", ("--tool", "synccheck"), 60),
        Piece("sweep", "stem", (*eager, *bf16, "--budget", "0.3", "--sweep"), 45),
        Piece("stem-others", "stem", (*eager, "--dtypes", "fp16,fp32", "--budget", "1"), 80),
        Piece("step-others", "step_time", (*eager, "--dtypes", "fp16,fp32", "--budget", "2", "--cases", "eager"), 100),
        Piece("resolutions", "stem", (*eager, *bf16, "--budget", "0.2", "--resolutions"), 60),
        Piece("stem-compiled", "stem", (*on, *bf16, "--budget", "2", "--modes", "forward+backward"), 120),
        Piece("operators-compiled", "operators", (*on, *bf16, "--budget", "0.3"), 120),
        Piece("step-compiled", "step_time", (*on, *bf16, "--budget", "3", "--cases", "graph,compiled"), 240),
        Piece("start-compiled", "start", (*on, *bf16), 300),
    ]


def chosen(found: Sequence[Piece], names: Sequence[str], tests: str, *, build: bool) -> list[Piece]:
    """The pieces that were asked for, in the suite's order.

    names: empty for all. What the others need (build, ceilings) is run as well, unless ``build`` is False.
    tests: "on" as any piece, "off" without them, "only" without all else.
    """
    known = [piece.name for piece in found]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"PIECES names {unknown[0]!r}; expected some of: {' '.join(known)}")
    wanted = set(names or known) | {"build", "ceilings"}
    if tests == "only":
        wanted = {"build", *TESTS}
    elif tests == "off":
        wanted -= set(TESTS)
    if not build:
        wanted.discard("build")
    return [piece for piece in found if piece.name in wanted]
