"""The teacher's regression targets: instance-normed blocks, averaged, layer-normed."""

from cat_kernels.targets.op import average_targets
from cat_kernels.targets.reference import average_targets_reference

__all__ = ["average_targets", "average_targets_reference"]
