"""Count what a reader of text finds and skips, and stop when it is too much.

Nothing is skipped in silence. What cannot be a document (a blank line, a number where a text should
be) is counted, and the counts end in the packing's report. A row in a hundred without text is
ordinary in a crawl; half of the rows means the wrong column. The limit is a thousand such rows in
succession, or a thousand among the first ten thousand:

>>> rows = [None if n % 9 == 0 else "text" for n in range(12_000)]
>>> list(only_text(rows, Counts(), source="'a.jsonl'", text_field="text"))  # doctest: +ELLIPSIS
Traceback (most recent call last):
annotated_mpnet.errors.DataError: 1,001 of the first 9,001 rows of 'a.jsonl' hold no text in the ...
>>> rows = [None if n % 11 == 0 else "text" for n in range(12_000)]
>>> len(list(only_text(rows, Counts(), source="'a.jsonl'", text_field="text")))
10909
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from annotated_mpnet.errors import DataError

NOT_TEXT_IN_SUCCESSION = 1000
"""In succession, this many rows without text are allowed."""

FIRST_ROWS = 10_000
"""Of the first rows of a source, at most a tenth may be without text."""


@dataclass
class Counts:
    """What has been read so far. Readers, filters and the packing all add to the same object.

    Attributes:
        documents: documents that were passed on.
        files: files that were read.
        empty_files: files without a document.
        skipped_files: hidden files, other endings and links to directories, in a directory.
        blank_lines: blank lines and rows.
        not_text: rows whose column held no text but nothing, a number, a list.
        too_short: texts below the minimum length.
        left_out: documents of another part of the text (`text/hold_out.py`).
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
        """One line: what was read, and what was skipped, if anything."""
        files = f" in {self.files:,} file{'s' * (self.files != 1)}" if self.files else ""
        unusual = {
            "empty files": self.empty_files,
            "other files skipped": self.skipped_files,
            "blank lines skipped": self.blank_lines,
            "rows without text skipped": self.not_text,
            "short texts skipped": self.too_short,
            "documents skipped: they are also in the validation or test set": self.left_out,
        }
        line = f"{self.documents:,} documents{files}"
        return line + "".join(f"; {count:,} {what}" for what, count in unusual.items() if count)


def only_text(
    values: Iterable[object], counts: Counts, *, source: str, text_field: str
) -> Iterator[str]:
    """Yield the texts in a column that are not blank, and count everything.

    >>> counts = Counts()
    >>> list(only_text(["one", None, 3, " ", "two"], counts, source="'a.jsonl'", text_field="text"))
    ['one', 'two']
    >>> print(counts)
    2 documents; 1 blank lines skipped; 2 rows without text skipped

    Args:
        values: of the column.
        counts: updated.
        source: of the column, for the message.
        text_field: its name, for the message.

    Raises:
        DataError: more than 1000 rows in succession, or among the first 10,000, hold no text.
    """
    before = counts.not_text
    in_succession = 0
    for number, value in enumerate(values):
        if isinstance(value, str):
            in_succession = 0
            # As in a text file: the sign of text in another encoding, or of no text at all.
            if "\0" in value:
                raise DataError(
                    f"row {number + 1:,} of {source} holds a NUL character in the column "
                    f"{text_field!r}; expected text: remove it, or the row"
                )
            if value.strip():
                counts.documents += 1
                yield value
            else:
                counts.blank_lines += 1
            continue
        in_succession += 1
        counts.not_text += 1
        among_the_first = number < FIRST_ROWS and counts.not_text - before > FIRST_ROWS // 10
        if in_succession > NOT_TEXT_IN_SUCCESSION or among_the_first:
            raise DataError(
                f"{counts.not_text - before:,} of the first {number + 1:,} rows of {source} hold "
                f"no text in the column {text_field!r}, the last one a {type(value).__name__}; "
                "expected strings: name another column with --text-field"
            )
