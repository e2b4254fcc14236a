"""The teacher's regression targets: instance-normed blocks, averaged, layer-normed."""

from .op import average_targets
from .reference import average_targets_reference

__all__ = ["average_targets", "average_targets_reference"]
