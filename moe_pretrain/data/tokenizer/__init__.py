"""Text to tokens: a byte-level BPE trained on the corpus, or any tokenizer that exists already."""
