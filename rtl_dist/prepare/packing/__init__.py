"""The packer's parts: ``plan`` decides, ``images`` checks, ``shard`` writes, ``work`` resumes."""
