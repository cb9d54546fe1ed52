"""What a data set is: its description, index and shards."""
