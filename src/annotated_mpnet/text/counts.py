"""What a reader of text meets and leaves out, counted; and when it is too much.

Nothing is left out in silence. What cannot be a document (a blank line, a number where a text
should be) is counted as it goes, and the counts end in the packing's report. One such row in a web
crawl is ordinary; a column of nothing else is the wrong column, which is a mistake to be told about
at once, not after a million rows.

What is too much? A row in a hundred without text is a crawl's ordinary dirt, half of the rows is a
wrong name. Between the two, a line is drawn twice: a thousand rows one after the other, wherever
they are, or a thousand among the first ten thousand.

>>> rows = [None if n % 9 == 0 else "text" for n in range(12_000)]
>>> list(only_text(rows, Counts(), source="'a.jsonl'", text_field="text"))  # doctest: +ELLIPSIS
Traceback (most recent call last):
annotated_mpnet.errors.DataError: 1,001 of the first 9,001 rows of 'a.jsonl' hold no text in the ...
>>> rows = [None if n % 11 == 0 else "text" for n in range(12_000)]
>>> len(list(only_text(rows, Counts(), source="'a.jsonl'", text_field="text")))
10909

Next: `text/file_formats.py` and `text/sources.py`, which count.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from annotated_mpnet.errors import DataError

NOT_TEXT_IN_A_ROW = 1000
"""So many rows without text, one after the other, are too many."""

FIRST_ROWS = 10_000
"""The rows at the beginning of a source, of which at most a tenth may be without text."""


@dataclass
class Counts:
    """What has been met so far.

    One object goes from hand to hand, and each who leaves something out adds to it: readers of
    files, filters, the packing. So the sum over all that was left out is said in one line.

    Attributes:
        documents: documents that were handed on.
        files: files that were read.
        empty_files: those of them without a document.
        skipped_files: what a directory held beside them: hidden files, other endings, links to
            directories.
        blank_lines: lines and rows that were skipped because nothing was on them.
        not_text: rows that were skipped because their column held no text: nothing at all, a
            number, a list.
        too_short: texts that were skipped for their length.
        left_out: documents that belong to another part of the text: see `text/hold_out.py`.
    """

    documents: int = 0
    files: int = 0
    empty_files: int = 0
    skipped_files: int = 0
    blank_lines: int = 0
    not_text: int = 0
    too_short: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        """Say what was read, and of the rest what there was."""
        files = f" in {self.files:,} file{'s' * (self.files != 1)}" if self.files else ""
        unusual = {
            "empty files": self.empty_files,
            "other files skipped": self.skipped_files,
            "blank lines skipped": self.blank_lines,
            "rows without text skipped": self.not_text,
            "short texts skipped": self.too_short,
            "documents left out, which another part of the text has": self.left_out,
        }
        line = f"{self.documents:,} documents{files}"
        return line + "".join(f"; {count:,} {what}" for what, count in unusual.items() if count)


def only_text(
    values: Iterable[object], counts: Counts, *, source: str, text_field: str
) -> Iterator[str]:
    """Yield what is text in a column, but for the blank, and count all.

    >>> counts = Counts()
    >>> list(only_text(["one", None, 3, " ", "two"], counts, source="'a.jsonl'", text_field="text"))
    ['one', 'two']
    >>> print(counts)
    2 documents; 1 blank lines skipped; 2 rows without text skipped

    Args:
        values: what stands in the column, row by row.
        counts: is added to.
        source: where the column is from, for the message.
        text_field: its name, for the message.

    Raises:
        DataError: more than 1000 rows in a row, or among the first 10,000, hold no text.
    """
    before = counts.not_text
    in_a_row = 0
    for number, value in enumerate(values):
        if isinstance(value, str):
            in_a_row = 0
            if value.strip():
                counts.documents += 1
                yield value
            else:
                counts.blank_lines += 1
            continue
        in_a_row += 1
        counts.not_text += 1
        # `number` counts this column's rows, `counts` those of all sources so far.
        among_the_first = number < FIRST_ROWS and counts.not_text - before > FIRST_ROWS // 10
        if in_a_row > NOT_TEXT_IN_A_ROW or among_the_first:
            raise DataError(
                f"{counts.not_text - before:,} of the first {number + 1:,} rows of {source} hold "
                f"no text in the column {text_field!r}, the last one a {type(value).__name__}; "
                "expected strings: name another column with --text-field"
            )
