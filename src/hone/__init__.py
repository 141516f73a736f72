"""hone: every published training technique is a switch.

>>> from hone import Recipe, run
>>> result = run(Recipe.of(data="chains", steps=50))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hone.engine.run import resume, run
    from hone.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "resume", "run"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: torch alone takes 3 s, and `hone --help` should not."""
    if name == "Recipe":
        from hone.recipe import Recipe

        return Recipe
    if name in ("run", "resume"):
        from hone.engine import run as engine

        return getattr(engine, name)
    raise AttributeError(f"module 'hone' has no attribute '{name}'")
