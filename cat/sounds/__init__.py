"""Synthetic sound events in numpy; nothing here knows about files. `cat.data.synth` makes data sets of them."""

from cat.sounds.events import CLASSES
from cat.sounds.scene import make_clip

__all__ = ["CLASSES", "make_clip"]
