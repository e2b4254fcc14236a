"""What a pre-training step should take on an H200, by arithmetic: a PREDICTION, not a measurement.

    python -m benchmarks.predict            # the tables; compiles the stem's kernels for sm_90
    python -m benchmarks.predict --write    # also between the markers of benchmarks/README.md and the stem's README.md
    python -m benchmarks.predict --before   # begins a new comparison: the step as later ones are compared with it

The model of a GPU and of the stem's kernels is in `predicted_stem.py`, the step around them in `predicted_step.py`.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks import predicted_step as whole
from benchmarks.predicted_stem import (
    SHAPE,
    Assumptions,
    compile_needed,
    compiled_names,
    kernel_table,
    pass_table,
    predict_all,
    stem,
)
from benchmarks.report import write_between
from benchmarks.runner import say
from cat.provenance import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also into benchmarks/README.md and the stem's README.md")
    parser.add_argument("--before", action="store_true", help="keep the step as what later ones are compared with")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it", file=sys.stderr)
        return 2
    a, masked, dense = Assumptions(), stem(SHAPE["masks"]), stem(0)
    compiled = compile_needed(compiled_names([*masked, *dense]))
    predictions = predict_all(masked, compiled, a)
    step = whole.predicted(SHAPE, a)
    tables = [whole.step_table(step), whole.kind_table(step), whole.memory_table(step)]
    tables += [pass_table(predictions, predict_all(dense, compiled, a)), kernel_table(predictions)]
    if options.before:
        whole.save(step, whole.BEFORE)
    tables.insert(0, whole.comparison_table(whole.load(whole.BEFORE), step))
    kept = whole.kept_table(step)
    for table in (*tables, kept):
        say(table.text() + "\n")
    say(a.told())
    if options.write:
        whole.save(step, whole.AFTER)
        text = "\n\n".join(table.markdown() for table in tables)
        write_between(ROOT / "benchmarks" / "README.md", "predict", f"{text}\n\n{a.told()}\n")
        write_between(ROOT / "cat_kernels" / "stem" / "README.md", "kept", f"{kept.markdown()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
