"""Models for other runtimes: `torch.export` and ONNX, of any length and batch, with the log-mel features inside."""

from cat.export.check import CHECK_ROWS, QUICK_ROWS, Difference, compare
from cat.export.graph import Graph, LogMel
from cat.export.model import Exportable, load_exportable
from cat.export.web.runtime import Runtime, find_runtime
from cat.export.web.site import Site, check_folder, write_site
from cat.export.write import SUFFIXES, check_suffix, export, metadata_of

__all__ = [
    "CHECK_ROWS",
    "QUICK_ROWS",
    "SUFFIXES",
    "Difference",
    "Exportable",
    "Graph",
    "LogMel",
    "Runtime",
    "Site",
    "check_folder",
    "check_suffix",
    "compare",
    "export",
    "find_runtime",
    "load_exportable",
    "metadata_of",
    "write_site",
]
