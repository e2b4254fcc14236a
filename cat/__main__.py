"""``python -m cat``: the same as the command ``cat-audio``."""

import sys

from cat.commands import main

if __name__ == "__main__":
    sys.exit(main())
