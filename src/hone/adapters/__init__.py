"""How weights are parameterised and which of them train."""
