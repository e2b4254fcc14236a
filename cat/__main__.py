"""``python -m cat``: the same as the command ``cat-audio``."""

import sys

from cat.cli import main

if __name__ == "__main__":
    sys.exit(main())
