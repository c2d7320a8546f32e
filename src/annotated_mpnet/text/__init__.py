"""Files and tokenizers to packed sequences."""
