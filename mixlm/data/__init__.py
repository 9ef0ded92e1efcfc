"""From text to batches: corpora, tokenized stores, pretraining examples, masking and the order of the data."""
