"""How the cells of a table of labelled examples are told apart."""

from pydantic import field_validator

from cairn.config.base import Section


class TableFormat(Section):
    """What the ending of a file does not say. Only files of lines and cells (.csv, .tsv) need any of it."""

    separator: str | None = None
    r"""The character between cells, `\t` for a tab; empty: a comma in .csv, a tab in .tsv."""
    quoting: bool | None = None
    """Whether a cell may be in double quotes and then hold separators and line ends; empty: not where tabs separate."""
    columns: list[str] = []
    """Names of the columns of files without a header; a last `*` stands for any further ones. Empty: the first line
    names them."""

    @field_validator("separator")
    @classmethod
    def _one_character(cls, separator: str | None) -> str | None:
        # What '\t' is on the command line and in YAML without double quotes.
        separator = "\t" if separator == r"\t" else separator
        if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
            raise ValueError(rf"expected one character, such as ; or \t, and no quote, got {separator!r}")
        return separator

    @field_validator("columns")
    @classmethod
    def _names(cls, columns: list[str]) -> list[str]:
        if len(set(columns)) < len(columns) or "" in columns:
            raise ValueError("expected different names, none of them empty")
        if "*" in columns[:-1] or columns == ["*"]:
            raise ValueError("expected * only as the last, after names")
        return columns
