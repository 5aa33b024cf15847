"""Line-aligned text in two files, as translations come."""

from collections.abc import Iterator
from itertools import zip_longest

from cairn.data.readers import text_lines
from cairn.data.tables import Row
from cairn.errors import UserError


def read_parallel(source_path: str, target_path: str) -> Iterator[Row]:
    """Pairs {"source": line n of the one file, "target": of the other}, without line ends. Pairs of blank lines are
    passed over.

    Raises UserError naming the line that is blank in one file alone, and, at the end, both numbers of lines where they
    differ.
    """
    both = zip_longest(text_lines(source_path), text_lines(target_path))
    for source, target in both:
        if source is None or target is None:
            longer, number = source_path if target is None else target_path, (source or target)[0]
            count = number + sum(1 for _ in both)
            counts = (count, number - 1) if longer == source_path else (number - 1, count)
            raise UserError(
                f"{source_path} has {counts[0]} lines, {target_path} {counts[1]}: "
                "line n of one must translate line n of the other"
            )
        (number, one), (_, other) = source, target
        one, other = one.rstrip("\r\n"), other.rstrip("\r\n")
        if bool(one.strip()) != bool(other.strip()):
            empty, full = (target_path, source_path) if one.strip() else (source_path, target_path)
            raise UserError(f"{empty}: line {number} is empty, but not that of {full}: fill it in, or remove both")
        if one.strip():
            yield Row(f"{source_path}: line {number}", {"source": one, "target": other})
