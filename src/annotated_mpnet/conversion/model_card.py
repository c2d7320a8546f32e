"""The model card of an export, `README.md`: what the model is, how it came about, how to use it.

Most of it cannot be read from the weights. So each checkpoint of a run has the facts, and an export
made a year later, of a checkpoint on another machine, says the same as one at the end of the run.
An export has them too, in annotated_mpnet.json, for a conversion of the export. The Hub reads the
block between the two `---` lines.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from annotated_mpnet.errors import without_password
from annotated_mpnet.mpnet.config import ModelConfig

FACTS = "annotated_mpnet.json"
FRESH = "none: the weights were random"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says about the training.

    Attributes:
        base: the model whose weights it started from, or `FRESH`; None if not known.
        base_on_hub: whether that is a name on the Hub.
        data: part (training, validation, test) -> name of its text.
        dataset: name on the Hub of the training text, if it has one.
        objective: in words.
        sequences: of an update, in words.
        settings: flags, where they are not the defaults.
        plateau_bits, plateau_accuracy: what guessing by frequency reaches on the validation text.
        valid_bits, valid_accuracy: of this model.
        test_bits, test_accuracy: of this model.
        updates, tokens, predicted: how much it was trained.
    """

    base: str | None = None
    base_on_hub: bool = False
    data: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    objective: str | None = None
    sequences: str | None = None
    settings: list[str] = field(default_factory=list)
    plateau_bits: float | None = None
    plateau_accuracy: float | None = None
    valid_bits: float | None = None
    valid_accuracy: float | None = None
    test_bits: float | None = None
    test_accuracy: float | None = None
    updates: int = 0
    tokens: int = 0
    predicted: int = 0


def place_name(path: str | Path) -> str:
    """Return what to call a path in public: the beginning of an absolute one is about a machine.

    >>> place_name("corpus/train"), place_name("/home/ann/corpus/train"), place_name("../train.txt")
    ('corpus/train', 'train', 'train.txt')
    """
    path = Path(path)
    tells_more = path.is_absolute() or ".." in path.parts or str(path).startswith("~")
    return path.resolve().name if tells_more else without_password(str(path))


def model_card(
    facts: CardFacts | None,
    config: ModelConfig,
    directory: Path,
    on_hub: str | None,
    *,
    parameters: int,
    is_sentence_encoder: bool,
    fresh_head: bool,
) -> str:
    """Return the text of `README.md`.

    Args:
        facts: of its training, as far as they are known.
        config: of the network.
        directory: where it is.
        on_hub: its name on the Hub, if it is uploaded there.
        parameters: their number.
        is_sentence_encoder: whether it has the modules of sentence-transformers.
        fresh_head: whether its LM head was made up and never trained.
    """
    facts = facts or CardFacts()
    name = on_hub or place_name(directory)
    # A run's export is RUN/hf.
    whole = directory.resolve()
    local = whole.parent.name if whole.name == "hf" else whole.name
    title = on_hub.rpartition("/")[2] if on_hub else local
    data = ModelCardData(
        library_name="sentence-transformers" if is_sentence_encoder else "transformers",
        pipeline_tag="sentence-similarity" if is_sentence_encoder else "fill-mask",
        tags=["mpnet", "annotated-mpnet"],
        base_model=facts.base if facts.base_on_hub else None,
        datasets=[facts.dataset] if facts.dataset else None,
    )
    lines = [
        *("---", data.to_yaml(), "---", "", f"# {title}", ""),
        "An encoder of the MPNet family ([arXiv 2004.09297](https://arxiv.org/abs/2004.09297)): "
        f"{config.encoder_layers} layers, {config.encoder_embed_dim} wide, {config.vocab_size:,} "
        f"tokens, {config.max_positions} positions, {parameters / 1e6:.1f} M parameters.",
        *("", "## Training", "", "| | |", "|---|---|"),
        *(f"| {key} | {_cell(value)} |" for key, value in _training(facts)),
        *_results(facts),
    ]
    if facts.settings:
        lines += ["", "Settings that differ from annotated-mpnet's defaults:", ""]
        lines += [f"    {each}" for each in facts.settings]
    return "\n".join([*lines, *_usage(name, is_sentence_encoder, fresh_head, facts), ""])


def _cell(text: str) -> str:
    # A line break or a bar would end the cell.
    return " ".join(text.split()).replace("|", "\\|")


def _training(facts: CardFacts) -> Iterator[tuple[str, str]]:
    base = facts.base or "not recorded"
    on_hub = f"[{base}](https://huggingface.co/{base})"
    yield "base model", on_hub if facts.base_on_hub else base
    if not facts.updates:
        yield "training", "none: this is the base model, converted"
        return
    for part in ("training", "validation", "test"):
        yield f"{part} text", facts.data.get(part, "none" if facts.data else "not recorded")
    yield "objective", facts.objective or "not recorded"
    yield "update", facts.sequences or "not recorded"
    yield (
        "trained",
        f"{facts.updates:,} updates, {facts.tokens:,} tokens, {facts.predicted:,} of them "
        "predicted",
    )


def _results(facts: CardFacts) -> Iterator[str]:
    results = [
        ("guessing by frequency, on the validation text", "plateau"),
        ("this model, on the validation text", "valid"),
        ("this model, on the test text", "test"),
    ]
    known = dataclasses.asdict(facts)
    lines = []
    for what, key in results:
        bits, accuracy = known[f"{key}_bits"], known[f"{key}_accuracy"]
        if bits is not None:
            share = "" if accuracy is None else f"{accuracy:.3f}"
            lines.append(f"| {what} | {bits:.3f} | {share} |")
    if lines:
        yield from ("", "## Results", "", "| | bits per predicted token | accuracy |")
        yield "|---|---:|---:|"
        yield from lines
    if facts.plateau_bits is not None and facts.valid_bits is not None:
        gain = facts.plateau_bits - facts.valid_bits
        worth = f"worth {gain:.2f} bits per token" if gain > 0 else "worth nothing yet"
        yield from ("", f"Guessing by frequency needs no network: the context is {worth}.")


def _usage(
    name: str, is_sentence_encoder: bool, fresh_head: bool, facts: CardFacts
) -> Iterator[str]:
    yield from ("", "## How to use it", "", "With sentence-transformers:", "", "```python")
    yield from (
        "from sentence_transformers import SentenceTransformer",
        "",
        f"model = SentenceTransformer({name!r})",
        'vectors = model.encode(["It rained all day.", "The weather was wet."])',
        "print(model.similarity(vectors, vectors))",
        "```",
    )
    if is_sentence_encoder and facts.updates:
        yield ""
        yield "It keeps the modules of its base model (pooling and what follows). Pretraining does"
        yield "not preserve sentence vectors: fine-tune them again on pairs of sentences."
    elif not is_sentence_encoder:
        yield ""
        yield "It was not trained to compare sentences: the vectors are means over the tokens."
        yield "Fine-tune it on pairs of sentences first."
    yield from ("", "With transformers:", "", "```python")
    if fresh_head:
        yield from (
            "from transformers import AutoModel, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f"model = AutoModel.from_pretrained({name!r})",
            'hidden = model(**tokenizer("It rained.", return_tensors="pt")).last_hidden_state',
            "```",
            "",
            "Its LM head was never trained: it fills no masks yet.",
        )
    else:
        yield from (
            "from transformers import pipeline",
            "",
            f'fill = pipeline("fill-mask", {name!r})',
            'print(fill(f"It {fill.tokenizer.mask_token} all day."))',
            "```",
        )
