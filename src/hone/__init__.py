"""hone: every published training technique is a switch."""

__version__ = "0.1.0"
