"""Text into tokens: sources, the tokenizer, token files, and the order in which training reads them."""
