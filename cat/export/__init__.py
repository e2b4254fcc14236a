"""Models for other runtimes: `torch.export` and ONNX, of any length and batch, with the log-mel features inside."""

from cat.export.check import CHECK_ROWS, QUICK_ROWS, Difference, compare
from cat.export.graph import Graph, LogMel
from cat.export.model import Exportable, load_exportable
from cat.export.write import SUFFIXES, check_suffix, export, metadata_of

__all__ = [
    "CHECK_ROWS",
    "QUICK_ROWS",
    "SUFFIXES",
    "Difference",
    "Exportable",
    "Graph",
    "LogMel",
    "check_suffix",
    "compare",
    "export",
    "load_exportable",
    "metadata_of",
]
