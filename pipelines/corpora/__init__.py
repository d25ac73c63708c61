"""One builder a source dataset; each turns a source into raw shards and an index."""
