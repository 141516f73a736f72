"""Text to tokens, the packed tree, attention over it, vocabulary losses, the language model and generation."""
