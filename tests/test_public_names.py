"""What users import, and that nothing heavy is imported before that."""

import subprocess
import sys

import pytest

import annotated_mpnet


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_alone_imports_nothing_heavy() -> None:
    program = (
        "import sys, annotated_mpnet; dir(annotated_mpnet); annotated_mpnet.__version__; "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert python("-c", program).strip() == "[]"


def test_the_model_is_imported_without_transformers() -> None:
    program = (
        "import sys; from annotated_mpnet import MPNetForPretraining, ModelConfig, Batch; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert python("-c", program).strip() == "['torch']"


def test_every_public_name_is_there_and_listed() -> None:
    assert set(annotated_mpnet.__all__) < set(dir(annotated_mpnet))
    for name in annotated_mpnet.__all__:
        assert getattr(annotated_mpnet, name).__name__ == name


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'annotated_mpnet' has no attribute 'Model'"):
        annotated_mpnet.Model  # noqa: B018
    with pytest.raises(ImportError):
        from annotated_mpnet import Model  # noqa: F401


def test_names_of_annotated_mpnet_are_importable_from_where_they_were() -> None:
    from annotated_mpnet.data import DataCollatorForMaskedPermutedLanguageModeling
    from annotated_mpnet.modeling import MPNetForPretraining

    assert MPNetForPretraining is annotated_mpnet.MPNetForPretraining
    assert (
        DataCollatorForMaskedPermutedLanguageModeling
        is annotated_mpnet.DataCollatorForMaskedPermutedLanguageModeling
    )
