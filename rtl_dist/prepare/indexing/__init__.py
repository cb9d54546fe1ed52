"""The indexer's parts: ``inputs`` finds shards, ``scan`` reads one, ``classes`` numbers labels."""
