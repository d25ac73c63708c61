"""Cross pairs: reference pictures of the same subjects from other frames and other clips."""
