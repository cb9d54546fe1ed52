"""What every test runs under: set before anything imports torch, matplotlib or wandb."""

import os
import tempfile

# Test processes share the cores (pytest -n); OpenMP threads that spin against each other's made the
# tests 7 times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rtl_dist-tests-")  # not the user's own
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WANDB_API_KEY"):
    os.environ.pop(_name, None)
