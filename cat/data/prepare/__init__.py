"""From audio as it was found to a data set to train on: every file checked, measured and, if asked, converted once.

`read_source` says which files there are (`source.py`), each is checked in one of several processes (`check.py`) and
written anew if asked (`convert.py`); `prepare_clips` (`work.py`) does it for all, goes on where it was stopped, and
writes the manifest and what was found out on the way (`report.py`).
"""

from cat.data.prepare.check import PrepareConfig
from cat.data.prepare.source import Source, read_source
from cat.data.prepare.work import Prepared, prepare_clips

__all__ = ["PrepareConfig", "Prepared", "Source", "prepare_clips", "read_source"]
