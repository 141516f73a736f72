"""The one training loop and what keeps a run safe; it never names a method."""
