"""Stop strings: text that ends generation and is not shown, wherever tokens cut it."""

from collections.abc import Sequence


def cut_off(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string in it, and whether there is one."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def settled(text: str, stops: Sequence[str]) -> int:
    """How many characters of a text without stop strings can be shown: its end may be the beginning of one."""
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)
