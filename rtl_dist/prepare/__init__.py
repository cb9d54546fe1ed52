"""Making and checking data sets: pack, index, verify.

``packing`` makes shards of images that ``sources`` lists, ``indexing`` describes shards that are
there, ``verifying`` checks either. Pack and index share ``splits`` (their names, and what must be
true of them), ``holdout`` (a val split taken from train), ``images`` (what may become a sample),
``publish`` (the index and ``dataset.json``) and ``work_folder`` (files whole or not there, one
process at a time).
"""
