"""``python -m rtl_dist COMMAND``, as torchrun starts it: the same as ``rtl-dist COMMAND``."""

from rtl_dist.cli import script

if __name__ == "__main__":
    script()
