"""Makes the starter model from the corpus: tokenizer, pre-training, 4 bits, evaluation."""
