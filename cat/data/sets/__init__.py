"""Public data sets, as people download them, to manifests with their official splits (`cat-audio dataset`)."""

from cat.data.sets.audioset import AUDIOSET
from cat.data.sets.esc import ESC10, ESC50
from cat.data.sets.fsdd import FSDD
from cat.data.sets.prepare import DataSet, prepare
from cat.data.sets.speechcommands import SPEECHCOMMANDS

SETS = {data_set.name: data_set for data_set in (ESC50, ESC10, SPEECHCOMMANDS, FSDD, AUDIOSET)}

__all__ = ["SETS", "DataSet", "prepare"]
