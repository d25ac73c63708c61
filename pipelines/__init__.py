"""The data path: corpora, shards, index, pairing, order, loading and encoding."""
