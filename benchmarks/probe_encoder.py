"""The models of `probe.py`: any network as an encoder of sentence-transformers, and its head.

Our network becomes a module of that library, so nothing has to be exported first, and what Hugging
Face's MPNet cannot represent can be probed as well.

    B batch   L tokens of a sentence   P predicted tokens   V vocabulary   D hidden width
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from scipy import stats
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import InputModule, Pooling
from transformers import PreTrainedTokenizerFast, PrinterCallback

from annotated_mpnet.conversion import LoadedWeights
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.initial_weights import DROPOUTS
from annotated_mpnet.runs.preparation import choose_attention
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.streams.eval_samples import Samples
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sources import LocalFiles
from annotated_mpnet.text.tokenizer import vocabulary_of
from learners import CPU
from probe_tasks import Similarity

LONGEST = 128
"""Tokens after which a text is cut, or earlier, where the network's positions end."""
BATCH = 32
EPOCHS = 4


class Network(InputModule):
    """Our network as a module of sentence-transformers, so nothing has to be exported."""

    def __init__(self, loaded: LoadedWeights, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.model, self.tokenizer = build_network(loaded), tokenizer

    def preprocess(self, inputs: Sequence[Any], *_: object, **__: object) -> dict[str, Any]:
        """Return a padded batch of texts."""
        length = longest(self.model)
        settings: Any = {"max_length": length, "truncation": True, "padding": True}
        return dict(self.tokenizer(list(inputs), return_tensors="pt", **settings))

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        """Add the hidden state of each token."""
        hidden_BLD = self.model.encode(features["input_ids"], features["attention_mask"])
        return features | {"token_embeddings": hidden_BLD}

    def save(self, *_: object, **__: object) -> None:
        """Save nothing; the class asks for this method."""


class Masked:
    """A trained network, as `learners.judge` wants it."""

    def __init__(
        self,
        loaded: LoadedWeights,
        tokenizer: PreTrainedTokenizerFast,
        source: LocalFiles | Samples,
    ) -> None:
        self.model, config = build_network(loaded).eval(), PretrainingConfig()
        data = replace(config.data, max_tokens=longest(self.model))
        optimization = replace(config.optimization, batch_size=BATCH)
        self.config = replace(config, data=data, optimization=optimization)
        sequences = pack_sequences(source, tokenizer, data.max_tokens, packing=data.packing)
        self.text = Text(tokenizer, vocabulary_of(tokenizer), sequences, sequences, None)

    def logits(self, batch: Batch, mode: InputMode) -> torch.Tensor:
        """Return logits (B, P, V)."""
        places, ids = batch.predicted_positions, batch.predicted_ids
        logits_BPV: torch.Tensor = self.model(
            batch.input_ids, places, ids, batch.attention_mask, mode
        )
        return logits_BPV


def build_network(loaded: LoadedWeights) -> MPNetForPretraining:
    """Return a network without dropout."""
    model = MPNetForPretraining(replace(loaded.config, **dict.fromkeys(DROPOUTS, 0.0)))
    model.load_state_dict(loaded.tensors)
    model.use_attention(ATTENTIONS[choose_attention("auto", CPU)[0]])
    return model


def longest(model: MPNetForPretraining) -> int:
    """Return the tokens after which a text is cut."""
    return min(LONGEST, model.config.max_positions)


def build_encoder(loaded: LoadedWeights, tokenizer: PreTrainedTokenizerFast) -> SentenceTransformer:
    """Return the network followed by the mean over the tokens."""
    network = Network(loaded, tokenizer)
    pooling = Pooling(loaded.config.encoder_embed_dim, "mean")
    # The card is never written, but the trainer would look for examples to show in it.
    card = SentenceTransformerModelCardData(local_files_only=True, generate_widget_examples=False)
    card.widget = [{}]
    return SentenceTransformer(modules=[network, pooling], device="cpu", model_card_data=card)


def similarity(encoder: SentenceTransformer, pairs: Similarity) -> float:
    """Return how well the cosine of two sentences agrees with people."""
    first, second = (vectors_of(encoder, texts) for texts in (pairs.first, pairs.second))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return spearman((first * second).sum(axis=1) / lengths, pairs)


def vectors_of(encoder: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """Return the vector of each text, (texts, D)."""
    vectors: np.ndarray = encoder.encode(texts, batch_size=BATCH, show_progress_bar=False)
    return vectors


def spearman(numbers: np.ndarray, pairs: Similarity) -> float:
    return float(stats.spearmanr(numbers, pairs.score).statistic)


def fine_tune(
    encoder: SentenceTransformer, pairs: tuple[list[str], list[str]], seed: int, lr: float
) -> None:
    """Train an encoder on pairs; the seed decides their order."""
    first, second = pairs
    updates = EPOCHS * -(-len(first) // BATCH)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=encoder,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH,
                learning_rate=lr,
                warmup_steps=round(0.1 * updates),
                seed=seed,
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict({"anchor": first, "positive": second}),
            loss=MultipleNegativesRankingLoss(encoder),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
