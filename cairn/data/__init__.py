"""From text to batches: corpus, tokenizer, shards, order, loader."""
