"""Names that tell things apart where their own do not."""

from collections.abc import Sequence
from pathlib import PurePath


def told_apart(names: Sequence[str], paths: Sequence[str], joint: str = " · ") -> list[str]:
    """Add to every name that occurs twice what is special about its path; to the rest nothing.

    Args:
        names: of things.
        paths: where each of them is; the parts that not all of one name share are added.
        joint: between a name and what is added.

    Returns:
        Names in the same order, all different: where paths do not differ either, they are numbered.
    """
    found = list(names)
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names) if other == name]
        if len(places) < 2:
            continue
        parts = [PurePath(paths[i]).parts for i in places]
        common = set(parts[0]).intersection(*parts)
        for i, own in zip(places, parts, strict=True):
            found[i] = joint.join([name, *(part.strip("/") or "root" for part in own if part not in common)])
    taken: set[str] = set()
    for i, name in enumerate(found):
        number = 2
        while found[i] in taken:
            found[i] = f"{name}{joint}{number}"
            number += 1
        taken.add(found[i])
    return found
