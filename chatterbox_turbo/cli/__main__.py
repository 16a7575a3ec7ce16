"""``python -m chatterbox_turbo.cli``: the same as the command ``chatterbox-turbo``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
