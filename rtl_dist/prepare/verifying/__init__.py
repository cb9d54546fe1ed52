"""The checker: ``verify`` tells the story, ``verification`` holds all that was found.

``splits`` compares index and description, ``shards`` reads and decodes; what they find are
``findings``. ``duplicates``, ``skew`` and ``sizes`` look at what is no damage, and ``summary`` says
it all.
"""
