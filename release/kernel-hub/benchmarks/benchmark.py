"""Every operator and its reference at the base model's width, by the package's specifications: `kernels benchmark .`"""

import dataclasses
import functools
import importlib

import torch
from kernels.benchmark import Benchmark
from torch.utils import _pytree as pytree

OPERATORS = (
    "MultiResConv",
    "gather_tokens",
    "residual_layer_norm",
    "grouped_conv2d",
    "layer_norm_gelu",
    "restore_tokens",
    "average_targets",
    "masked_regression_loss",
    "ema_update_",
    "fbank",
)


class CatKernels(Benchmark):
    """Forward passes: bf16 and 16 clips on a GPU, float32 and one clip elsewhere."""

    seed = 0

    def prepare(self, name):
        """The operator's inputs. Parity is checked here, by the rule that knows dtypes; `verify_` gives the time."""
        specification = importlib.import_module(".spec", self.kernel.__name__)
        specs = importlib.import_module(".specs", self.kernel.__name__).specs
        self.spec = next(spec for spec in specs() if spec.name == name)
        on_gpu = self.device == "cuda"
        dtype = torch.bfloat16 if on_gpu and torch.bfloat16 in self.spec.dtypes else torch.float32
        sample = self.spec.benchmark(torch.device(self.device), dtype, 16 if on_gpu else 1)
        sample = dataclasses.replace(sample, differentiable=())
        specification.check_parity(self.spec, sample)
        self.inputs = specification.fresh(sample, requires_grad=False)

    def call(self, function):
        with torch.no_grad():
            result = function(**self.inputs)
        if result is None:  # written in place
            result = [self.inputs[name] for name in self.spec.mutates]
        return next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))

    def run_operator(self):
        self.out = self.call(self.spec.operator)

    def run_reference(self):
        self.call(self.spec.reference)
        return self.out


for _name in OPERATORS:
    setattr(CatKernels, f"setup_{_name}", functools.partialmethod(CatKernels.prepare, _name))
    setattr(CatKernels, f"benchmark_{_name}", CatKernels.run_operator)
    setattr(CatKernels, f"verify_{_name}", CatKernels.run_reference)
