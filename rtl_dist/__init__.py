"""rtl_dist: distributed transfer learning with ResNets."""

__version__ = "0.1.0"
