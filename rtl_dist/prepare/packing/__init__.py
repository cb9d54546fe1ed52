"""The packer: ``pack`` tells the story, from a source to ``publish``.

``plan`` decides what goes where, ``shard`` writes, and ``resume`` keeps what a start that was
killed has finished.
"""
