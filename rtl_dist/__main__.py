"""``python -m rtl_dist COMMAND``, as torchrun starts it: the same as ``rtl-dist COMMAND``."""

import sys

from rtl_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
