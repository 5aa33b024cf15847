"""Tagged tokens in columns, as the CoNLL shared tasks have them."""

import re
from collections.abc import Iterator

from cairn.data.readers import text_lines
from cairn.data.tables import Row
from cairn.errors import UserError

BLANK = " \t\r\n"  # not str.isspace: a token may be an ideographic space


def read_conll(path: str, tagged: bool = True) -> Iterator[Row]:
    """Sentences {"tokens": [str], "tags": [str]}, each with the line it begins on.

    A line has two columns or more, the token first and the tag last, with one tab or any run of spaces between. A
    blank line ends a sentence, and so does a -DOCSTART- line. Where `tagged` is false, a file may have tokens alone,
    and its sentences no "tags". Raises UserError naming the line that has other columns.
    """
    tokens: list[str] = []
    tags: list[str] = []
    begun = width = first = 0

    def sentence() -> Row:
        return Row(f"{path}: line {begun}", {"tokens": tokens} | ({"tags": tags} if width > 1 else {}))

    for number, line in text_lines(path):
        line = line.strip("\r\n")
        if not line.strip(BLANK) or line.startswith("-DOCSTART-"):
            if tokens:
                yield sentence()
            tokens, tags = [], []
            continue
        columns = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if len(columns) < 2 and (tagged or width > 1):
            raise UserError(f"{path}: line {number} has one column; expected a token, a tab or spaces, and its tag")
        if width and len(columns) != width:
            raise UserError(
                f"{path}: line {number} has {len(columns)} columns, line {first} has {width}: "
                "mend the line; between columns is one tab, or spaces in a line without tabs"
            )
        if not columns[0].strip(BLANK) or not columns[-1].strip(BLANK):
            raise UserError(f"{path}: line {number} has an empty {'tag' if columns[0].strip(BLANK) else 'token'}")
        if not tokens:
            begun = number
        if not width:
            width, first = len(columns), number
        tokens.append(columns[0])
        tags.append(columns[-1])
    if tokens:
        yield sentence()
