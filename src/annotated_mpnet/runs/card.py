"""What a run knows for the model card of its exports (`conversion/model_card.py`)."""

from pathlib import Path

from annotated_mpnet.conversion.kept import base_facts
from annotated_mpnet.conversion.model_card import FRESH, CardFacts, place_name
from annotated_mpnet.errors import without_password
from annotated_mpnet.mpnet.config import ObjectiveConfig, flag
from annotated_mpnet.settings.config import DataConfig, PretrainingConfig, non_defaults
from annotated_mpnet.streams.hub import DEFAULT_DATASET
from annotated_mpnet.tracking.sinks import setting_text

OBJECTIVES = {
    "mpnet": "masked and permuted (MPNet)",
    "mlm": "masked (MLM)",
    "plm": "permuted (PLM)",
}
ABOUT_TRAINING = ("data", "optimization")
"""Groups of settings that decide what is learned. The others are about the machine and the run."""
TOLD_ELSEWHERE = (
    *("train_dir", "valid_file", "test_file", "valid_fraction", "tokenizer_name", "num_workers"),
    *("dataset_name", "dataset_config", "dataset_split", "dataset_revision", "max_positions"),
)


def card_facts(config: PretrainingConfig, source: str | None) -> CardFacts:
    """Return what is known before the first update.

    Args:
        config: of the run.
        source: the model that the weights come from; None for random ones.
    """
    base = CardFacts(base=FRESH) if source is None else base_facts(source)
    data, dataset = _data(config.data)
    return CardFacts(
        base=base.base,
        base_on_hub=base.base_on_hub,
        data=data,
        dataset=dataset,
        objective=_objective(config.objective),
        settings=_settings(config),
    )


def _objective(objective: ObjectiveConfig) -> str:
    """Say what is predicted.

    >>> _objective(ObjectiveConfig())
    'masked and permuted (MPNet): 15% of the tokens predicted, whole words; 10% kept, 10% random'
    """
    words = ", whole words" if objective.whole_word_mask else ""
    kept, random = 100 * objective.keep_prob, 100 * objective.rand_prob
    return (
        f"{OBJECTIVES[objective.input_mode]}: {100 * objective.pred_prob:g}% of the tokens "
        f"predicted{words}; {kept:g}% kept, {random:g}% random"
    )


def _data(data: DataConfig) -> tuple[dict[str, str], str | None]:
    """Return the name of each part of the text, and the name of the dataset on the Hub.

    >>> _data(DataConfig(train_dir=Path("/home/ann/poems"), valid_fraction=0.01))
    ({'training': 'poems', 'validation': '1% of the training text, held out'}, None)
    """
    dataset = None
    if data.train_dirs:
        names = {"training": ", ".join(map(place_name, data.train_dirs))}
    else:
        name = data.dataset_name or DEFAULT_DATASET
        dataset = None if Path(name).expanduser().is_dir() else name
        parts = {
            "configuration": data.dataset_config,
            "split": data.dataset_split,
            "revision": data.dataset_revision,
        }
        of_it = ", ".join(f"{part} {value}" for part, value in parts.items() if value)
        names = {"training": f"{dataset or place_name(name)} ({of_it})"}
        if data.streaming and data.eval_samples:
            names |= {"validation": "documents held out of it", "test": "documents held out of it"}
    if data.valid_fraction:
        names["validation"] = f"{100 * data.valid_fraction:g}% of the training text, held out"
    for part, path in (("validation", data.valid_file), ("test", data.test_file)):
        if path is not None:
            names[part] = place_name(path)
    return names, dataset


def _settings(config: PretrainingConfig) -> list[str]:
    """Return the settings that decide what is learned, as flags, where they are not the default."""
    given = []
    for group, each, value in non_defaults(config):
        told = group in ABOUT_TRAINING and each.name not in TOLD_ELSEWHERE
        if not (told or each.name.endswith("dropout")):
            continue
        if isinstance(value, bool):
            given.append(flag(each.name) if value else flag(f"no_{each.name}"))
        else:
            given.append(without_password(f"{flag(each.name)} {setting_text(value)}"))
    return [*given, f"--seed {config.run.seed}"]
