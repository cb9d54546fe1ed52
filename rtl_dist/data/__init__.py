"""From image files to batches on the device: packing, indexing, order, decoding, loading."""
