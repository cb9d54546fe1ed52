"""The parts of ``rtl-dist verify``."""
