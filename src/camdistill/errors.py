"""Mistakes of the user, told in one line: what was given, what is true, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake whose message tells the cure; the command line prints it and exits with 2."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """The options most like a name, ready to end an error's sentence.

    Returns:
        `"nearest: 'layer4', 'layer3'"`, or all options when there are few and none is alike.
    """
    known = list(options)
    alike = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if alike:
        return "nearest: " + ", ".join(repr(option) for option in alike)
    if not known:
        return "there is none"
    shown = ", ".join(repr(option) for option in known[:8])
    return f"there are: {shown}" + (", ..." if len(known) > 8 else "")
