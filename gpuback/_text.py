"""Show text from outside, such as file names, labels and cells: escaped, and shortened where it is long.

Every message of gpuback's errors is `shown`. What reaches a terminal or a log in another way has to call it.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence

MOST_IN_MESSAGE = 2000
"""The characters of a message: about a terminal's screen."""

MOST_IN_NAME, MOST_IN_VALUE = 200, 500
"""The characters of one name or cell, and of one list or other value, in a message."""

_MOST_COMPARED, _LONGEST_COMPARED = 1000, 100
"""Names that `did_you_mean` looks at, and their lengths: the time grows with their product."""

_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxfrozenset = _repr.maxdeque = 50
_repr.maxstring = _repr.maxlong = _repr.maxother = MOST_IN_NAME


def escaped(text: str) -> str:
    """Return text of one line with backslash escapes, as in Python's literals, for what would not show as a character.

    Control characters could steer a terminal, line breaks could forge a line of a log, and characters that reverse the
    order of others could disguise a name. Lone surrogates, which stand for undecodable bytes, cannot be encoded.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shown(text: str, most: int = MOST_IN_MESSAGE) -> str:
    """Return `escaped` text of at most `most` characters; a longer one loses its middle."""
    whole = escaped(text[: most + 1])
    if len(whole) <= most:
        return whole
    gap = f" … ({len(text):,} characters) … "
    kept = most - len(gap)
    end = kept // 4  # where a message has its remedy
    return whole[: kept - end] + gap + escaped(text[-most:])[-end:]


def quoted(value: object, most: int = MOST_IN_VALUE) -> str:
    """Return a value's `repr`, escaped; cut where it is long or deep."""
    try:
        text = _repr.repr(value)
    except Exception:  # such as an integer of more digits than Python converts
        text = f"<{type(value).__name__}>"
    return shown(text, most)


def listed(names: Sequence[object], most: int = 20) -> str:
    """Return "a, b, c", or "a, b, … and 999,998 more" for more than `most` names."""
    some = [shown(str(name), MOST_IN_NAME) for name in names[:most]]
    return ", ".join([*some, f"… and {len(names) - most:,} more"] if len(names) > most else some)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'adam'?" for the nearest known name; "" if none is near or there are too many to look."""
    if len(name) > _LONGEST_COMPARED or len(known) > _MOST_COMPARED:
        return ""
    nearest = difflib.get_close_matches(name, [other for other in known if len(other) <= _LONGEST_COMPARED], n=1)
    return f" Did you mean {quoted(nearest[0])}?" if nearest else ""
