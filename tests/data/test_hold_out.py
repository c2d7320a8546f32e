"""Documents that are held out are never trained on, and neither are their copies."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.hold_out import hashes_of, split_by_hash, text_hash, without_texts


@dataclass(frozen=True)
class Listed:
    """A source of documents in a list."""

    texts: tuple[str, ...]
    fingerprint: str = "listed"
    skipped_files: int = 0

    def documents(self, counts: Counts) -> Iterator[str]:
        for text in self.texts:
            counts.documents += 1
            yield text


# Every third text is a copy of an earlier one.
CORPUS = Listed(tuple(f"text {i % 700}" for i in range(1050)))


def test_parts_are_disjoint_although_there_are_copies_and_nothing_is_lost():
    train, valid = split_by_hash(CORPUS, 0.1)
    counts = Counts(), Counts()
    trained, held_out = list(train.documents(counts[0])), list(valid.documents(counts[1]))
    assert set(trained).isdisjoint(held_out)
    assert sorted(trained + held_out) == sorted(CORPUS.texts)
    assert 40 < len(set(held_out)) < 100  # 70 +- four standard deviations
    assert (counts[0].documents, counts[0].left_out) == (len(trained), len(held_out))
    assert (counts[1].documents, counts[1].left_out) == (len(held_out), len(trained))


def test_larger_fraction_holds_out_more_and_never_gives_back():
    parts = [
        set(split_by_hash(CORPUS, fraction)[1].documents(Counts())) for fraction in (0.1, 0.2, 0.5)
    ]
    assert parts[0] < parts[1] < parts[2]


def test_fingerprints_tell_source_part_and_fraction_apart():
    named = [
        part.fingerprint
        for source in (CORPUS, Listed(("a",), "another"))
        for fraction in (0.1, 0.2)
        for part in split_by_hash(source, fraction)
    ]
    named.append(without_texts(CORPUS, frozenset({1})).fingerprint)
    named.append(without_texts(CORPUS, frozenset({1, 2})).fingerprint)
    assert len(set(named)) == len(named)
    assert without_texts(CORPUS, frozenset({2, 1})).fingerprint == named[-1]


def test_part_without_a_document_is_refused():
    few = Listed(("a", "b"))
    with pytest.raises(DataError, match=r"0\.0001 holds out none of the 2 documents"):
        list(split_by_hash(few, 0.0001)[1].documents(Counts()))
    with pytest.raises(DataError, match=r"0\.9999 holds out all of the 2 documents"):
        list(split_by_hash(few, 0.9999)[0].documents(Counts()))


def test_texts_of_other_files_are_left_out_with_all_their_copies():
    other = Listed(("text 3", "text 5", "not in the corpus"))
    counts = Counts()
    remaining = list(without_texts(CORPUS, hashes_of(other)).documents(counts))
    assert remaining == [text for text in CORPUS.texts if text not in other.texts]
    assert (counts.documents, counts.left_out) == (len(remaining), 4)


def test_training_text_that_is_the_validation_text_is_refused():
    with pytest.raises(DataError, match="all 1,050 documents of the training text are also in"):
        list(without_texts(CORPUS, hashes_of(CORPUS)).documents(Counts()))


def test_the_hash_of_a_text_never_changes():
    assert text_hash("It rained.") == 17034653214643411499
    assert text_hash("") != text_hash(" ")
