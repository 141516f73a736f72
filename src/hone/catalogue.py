"""The catalogue for people and programs: every part and every shipped recipe, read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hone import parts
from hone.errors import HoneError, nearest
from hone.recipe import SHIPPED, read_yaml, shipped


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: a part or a recipe.

    Args:
        kind: kind of the part, or "recipe".
        name: its name.
        summary: one line.
        papers: (title, identifier) pairs.
        claim: what its paper says, in a sentence.
        deviations: how it differs from the paper.
        options: of a part; a recipe has none.
        body: the docstring of a part, the file of a recipe.
    """

    kind: str
    name: str
    summary: str
    papers: tuple[tuple[str, str], ...]
    claim: str
    deviations: str
    options: tuple[parts.Option, ...]
    body: str

    def plain(self) -> dict[str, Any]:
        """Return the entry as `hone list --json` prints it."""
        return {
            "kind": self.kind, "name": self.name, "summary": self.summary,
            "papers": [{"title": title, "id": paper} for title, paper in self.papers],
            "claim": self.claim, "verdict": None, "deviations": self.deviations,
            "options": [{"name": o.name, "type": o.type, "default": o.default, "doc": o.doc} for o in self.options],
        }  # fmt: skip

    def text(self) -> str:
        """Return the entry as `hone show` prints it: a recipe's file, or a part's page."""
        if self.kind == "recipe":
            return self.body.rstrip("\n")
        lines = [f"{self.kind} {self.name}", "", self.body.strip(), ""]
        lines += [f"paper: {title} ({paper})" for title, paper in self.papers]
        about = (("claim", self.claim), ("deviations", self.deviations))
        lines += [f"{label}: {text}" for label, text in about if text]
        lines += ["options:"] if self.options else []
        for o in self.options:
            lines.append(f"  {o.name}: {o.type}" + (f" = {o.default}" if o.default else "  (required)"))
            if o.doc and o.doc not in " ".join(self.body.split()):  # an inherited option, which the body leaves out
                lines.append(f"      {o.doc}")
        field = {"callback": "callbacks", "metric": "metrics"}.get(self.kind, self.kind)
        value = f"[{self.name}]" if field != self.kind else self.name
        return "\n".join([*lines, "in a recipe:", f"  {field}: {value}"])


def entries(kind: str | None = None) -> list[Entry]:
    """Return the catalogue, or the entries of one kind.

    Args:
        kind: a kind of part, or "recipe"; None returns all.

    Raises:
        HoneError: there is no such kind.
    """
    kinds = (*parts.KINDS, "recipe")
    if kind is not None and kind not in kinds:
        raise HoneError(f"there is no kind '{kind}' ({nearest(kind, kinds) or 'kinds: ' + ', '.join(kinds)})")
    found = [_of_part(record) for record in parts.catalogue() if kind in (None, record.kind)]
    return found + ([_of_recipe(name) for name in shipped()] if kind in (None, "recipe") else [])


def named(name: str, kind: str | None = None) -> list[Entry]:
    """Return the entries of a name: several where kinds share it.

    Args:
        name: name of a part or a recipe; "peft:vera" finds the bridge "peft:".
        kind: a kind of part, or "recipe"; None looks among all.

    Raises:
        HoneError: there is none; the message gives the nearest.
    """
    everything = entries(kind)
    prefix = name.split(":", 1)[0] + ":"
    found = [e for e in everything if e.name == name or (":" in name and e.name == prefix)]
    if not found:
        hint = nearest(name, (e.name for e in everything)) or "see: hone list"
        raise HoneError(f"there is no {kind or 'part or recipe'} called '{name}' ({hint})")
    return found


def _of_part(r: parts.Record) -> Entry:
    return Entry(r.kind, r.name, r.summary, r.papers, r.claim, r.deviations, r.options, r.doc)


def _of_recipe(name: str) -> Entry:
    path = SHIPPED / f"{name}.yaml"
    about = read_yaml(path)[0].get("about") or {}
    papers = about.get("papers") or []
    pairs = tuple((title, paper) for title, paper in papers) if isinstance(papers, list) else ()
    text, claim, deviations = (about.get(key, "") for key in ("text", "claim", "deviations"))
    return Entry("recipe", name, text, pairs, claim, deviations, (), path.read_text(encoding="utf-8"))
