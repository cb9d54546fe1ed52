"""The indexer: ``index`` tells the story, from ``inputs`` to ``publish``.

``inputs`` finds the shards and their splits, ``local_copy`` fetches a remote one. ``scan`` reads
each, with ``samples`` (which members make one) and ``labels`` (what a label member says). ``merge``
looks at all of them together, ``classes`` numbers the labels, ``publish`` describes the splits.
"""
