"""The skills of the `chains` data: small problems with worked steps and exact answers, in two families."""

from __future__ import annotations

from collections.abc import Iterable

from hone.data.skills.arithmetic import ARITHMETIC
from hone.data.skills.base import Problem, Skill
from hone.data.skills.lists import LISTS
from hone.errors import HoneError, nearest

__all__ = ["SKILLS", "Problem", "Skill", "choose", "final_answer", "solve"]

SKILLS: dict[str, Skill] = {skill.name: skill for skill in (*ARITHMETIC, *LISTS)}


def choose(names: Iterable[str] | None) -> tuple[Skill, ...]:
    """Return the skills that names ask for, each once, in the order of `SKILLS`.

    Args:
        names: names of skills, of families ("arithmetic", "list"), "easy" or "hard"; None asks for all.

    Raises:
        HoneError: a name is none of these, or there is none.
    """
    groups: dict[str, list[Skill]] = {}
    for skill in SKILLS.values():
        for name in (skill.name, skill.family, "easy" if skill.easy else "hard"):
            groups.setdefault(name, []).append(skill)
    wanted = list(groups if names is None else names)
    unknown = [name for name in wanted if name not in groups]
    if unknown:
        hints = (f"'{name}' ({nearest(name, groups) or 'known: ' + ', '.join(sorted(groups))})" for name in unknown)
        raise HoneError(f"there is no skill {', nor '.join(hints)}")
    if not wanted:
        raise HoneError("the list of skills is empty; leave it out to use all of them")
    return tuple(skill for skill in SKILLS.values() if any(skill in groups[name] for name in wanted))


def solve(prompt: str) -> str:
    """Return the exact answer to a prompt, recomputed from its text.

    Raises:
        HoneError: the prompt does not begin with the name of a skill.
    """
    name = prompt.split(" ", 1)[0]
    if name not in SKILLS:
        raise HoneError(f"a prompt of chains begins with the name of a skill, got {prompt!r}")
    return SKILLS[name].solve(prompt)


def final_answer(text: str) -> str | None:
    """Return what the last line that begins with "answer:" says, or None when there is no such line."""
    lines = [line for line in text.splitlines() if line.startswith("answer:")]
    return " ".join(lines[-1].removeprefix("answer:").split()) if lines else None
