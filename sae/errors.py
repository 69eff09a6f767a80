"""The one exception that means "you, the user, can fix this"."""


class UserError(ValueError):
    """Bad input: one sentence with the offending value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    Broken invariants are `assert`s, not `UserError`s.
    """


def unknown(kind: str, value: object, known: list[str], remedy: str = "") -> UserError:
    """Build the error for a name that is not in a list, with the nearest known names.

    Args:
        kind: what the name is, e.g. ``"hook name"``.
        value: the name the user gave.
        known: every acceptable name.
        remedy: a closing hint; the nearest names are always given.
    """
    import difflib

    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.4)
    if near:
        hint = f"did you mean {', '.join(near)}?"
    elif len(known) <= 12:
        hint = f"known: {', '.join(known) or 'none'}."
    else:
        hint = f"{len(known)} are known, for example {', '.join(known[:3])}."
    return UserError(f"unknown {kind} {value!r}: {hint}{' ' + remedy if remedy else ''}")
