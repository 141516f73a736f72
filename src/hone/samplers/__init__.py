"""How a token is picked from logits."""
