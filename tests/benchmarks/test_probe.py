"""`benchmarks/probe.py` scores every kind of model in the same way."""

from pathlib import Path

import numpy as np
import pytest
from scripts import checked, run_main
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

import probe
import probe_encoder
import probe_tasks
from annotated_mpnet.errors import DataError
from tiny_run import changed, run, tiny_config, write_text

WORDS = list("abcdefghijklmn")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run and STS-B in small."""
    folder = tmp_path_factory.mktemp("probe")
    text = write_text(folder / "text")
    run(changed(tiny_config(text, folder / "run"), total_updates=2, test_file=None))
    random = np.random.default_rng(1)
    for split in ("train", "test"):
        sentences = [" ".join(random.choice(WORDS, 6)) for _ in range(80)]
        lines = [
            f'"{first}, then",{second},{number % 6}.0\n'
            for number, (first, second) in enumerate(
                zip(sentences[:40], sentences[40:], strict=True)
            )
        ]
        (folder / f"en-{split}.csv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def novels() -> probe_tasks.Examples:
    return probe_tasks.novel_examples(240)


@pytest.fixture(scope="module")
def order() -> probe_tasks.Examples:
    return probe_tasks.order_examples(200)


def some(examples: probe_tasks.Examples) -> probe_tasks.Examples:
    return probe_tasks.Examples(*(each[::4] for each in examples))


# The trainer of sentence-transformers warns of what will change.
@pytest.mark.filterwarnings("ignore")
def test_a_run_its_export_and_an_encoder_made_of_it_get_the_same_scores(
    directory: Path,
    novels: probe_tasks.Examples,
    order: probe_tasks.Examples,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(probe, "novel_examples", lambda _: some(novels))
    monkeypatch.setattr(probe, "order_examples", lambda _: some(order))
    export, encoder = directory / "run" / "hf", directory / "encoder"
    SentenceTransformer(str(export), device="cpu").save(str(encoder))
    models = [str(path) for path in (directory / "run", export, encoder)]
    flags = [*models, "--stsb", str(directory), "--seeds", "1", "--lr", "1e-2"]
    flags += ["--examples", "100", "--masked", str(directory / "text" / "valid.txt")]
    monkeypatch.setattr(probe_encoder, "EPOCHS", 1)
    *results, words = run_main(probe.main, flags, directory, monkeypatch)
    assert [each.pop("model") for each in results] == models
    for result in results:
        for task in probe.TASKS:
            # The encoder has no head: sentence-transformers saves none.
            if task in result:
                values = results[0][task]["values"]
                assert result[task]["values"] == pytest.approx(values, abs=0.02)
    assert list(results[0]) == list(results[1]) == list(probe.TASKS)
    assert list(results[2]) == ["sts", "tuned", "novel", "order"]
    assert list(words) == ["model", "sts", "novel", "order"]
    assert len(results[0]["tuned"]["values"]) == 1
    assert len(results[0]["novel"]["values"]) == probe.FOLDS
    assert results[0]["tuned"]["mean"] != results[0]["sts"]["mean"]
    assert 0 <= results[0]["masked"]["mean"] < 1
    assert results[0]["bits"]["mean"] == pytest.approx(np.log2(400), abs=0.3)
    printed = checked(capsys.readouterr().out).splitlines()
    assert printed[-1].startswith(probe.WORDS)
    assert "±" in printed[-1]

    opened = SentenceTransformer(str(export), device="cpu")
    theirs = EmbeddingSimilarityEvaluator(
        *probe_tasks.read_similarity(directory, "test", 100), main_similarity="cosine"
    )(opened)
    assert results[0]["sts"]["mean"] == pytest.approx(theirs["spearman_cosine"], abs=1e-3)


def test_a_linear_classifier_finds_what_is_there_and_nothing_else(
    order: probe_tasks.Examples,
) -> None:

    noise = np.random.default_rng(1).normal(size=(200, 8))
    found = noise + 3 * np.array(order.labels)[:, None]
    classifier = probe.make_pipeline(probe.StandardScaler(), probe.RidgeClassifierCV(probe.ALPHAS))
    assert np.mean(probe.accuracies(classifier, found, order)) > 0.95
    assert 0.35 < np.mean(probe.accuracies(classifier, noise, order)) < 0.65


def test_novels_are_equally_frequent_and_without_names(novels: probe_tasks.Examples) -> None:
    assert [novels.labels.count(label) for label in range(6)] == [40] * 6
    assert not [text for text in novels.texts if "Emma" in text or "Darcy" in text]
    of_chapter: dict[int, int] = {}
    for label, chapter in zip(novels.labels, novels.chapters, strict=True):
        assert of_chapter.setdefault(chapter, label) == label
    assert len(of_chapter) > 100


def test_half_of_the_sentences_are_swapped(order: probe_tasks.Examples) -> None:
    assert sum(order.labels) == 100
    books = [" ".join(probe_tasks.read_novel(name)) for name in probe_tasks.NOVELS]
    in_order = [any(text in book for book in books) for text in order.texts]
    assert in_order == [label == 0 for label in order.labels]


@pytest.mark.parametrize(
    ("line", "said"), [("only,two\n", "line 2"), ("one,two,high\n", "expected two sentences")]
)
def test_a_line_without_two_sentences_and_a_score_is_named(
    line: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "stsb-en-test.csv").write_text("a,b,1.0\n" + line)
    with pytest.raises(DataError, match=said):
        probe_tasks.read_similarity(tmp_path, "test", 100)
