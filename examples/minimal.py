"""MPNet on one page: from text and tokenizer to hidden states, with only the book of this project:
python examples/minimal.py my_text.txt microsoft/mpnet-base
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from annotated_mpnet.mpnet import collator
from annotated_mpnet.mpnet.config import ModelConfig, ObjectiveConfig, OptimizationConfig
from annotated_mpnet.mpnet.local_start import start_locally
from annotated_mpnet.mpnet.optimizer import build_optimizer, learning_rate, set_learning_rate
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.mpnet.randomness import fold_in

SEED, LENGTH, BATCH_SIZE = 12345, 64, 32


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> collator.Vocabulary:
    """Return what masking needs to know: special tokens, and which tokens begin a word."""
    ids = tokenizer.get_vocab()
    size = max(ids.values()) + 1
    is_special_V, starts_V, ends_V = np.zeros((3, size), dtype=bool)
    is_special_V[tokenizer.all_special_ids] = True
    # WordPiece marks tokens that continue a word, BPE and SentencePiece those that begin one.
    mark = next((m for m in ("##", "Ġ", "▁") if any(each.startswith(m) for each in ids)), "")
    for token, number in ids.items():
        starts_V[number] = token.startswith(mark) != (mark == "##")
    special = [getattr(tokenizer, f"{s}_token_id") for s in ("pad", "mask", "cls", "sep", "unk")]
    ordinary = np.flatnonzero(~is_special_V)
    return collator.Vocabulary(size, *special, is_special_V, starts_V, ends_V, random_ids=ordinary)


def main(text: str, tokenizer_name: str, updates: int = 300) -> None:
    """Pretrain on a CPU."""
    # From text to sequences: <s>, 62 tokens, </s>.
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    vocabulary = vocabulary_of(tokenizer)
    tokens = tokenizer(Path(text).read_text(), add_special_tokens=False, verbose=False).input_ids
    pieces = [tokens[start : start + LENGTH - 2] for start in range(0, len(tokens), LENGTH - 2)]
    sequences = [np.array([vocabulary.cls_id, *piece, vocabulary.sep_id]) for piece in pieces]
    collate = collator.DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary, ObjectiveConfig(), max_tokens=LENGTH, seed=SEED
    )

    # A small model and the paper's optimizer.
    torch.manual_seed(SEED)
    size = {"encoder_layers": 3, "encoder_embed_dim": 128, "encoder_ffn_dim": 512}
    size |= {"encoder_attention_heads": 4, "max_positions": LENGTH, "vocab_size": vocabulary.size}
    model = MPNetForPretraining(ModelConfig(**size, pad_token_id=vocabulary.pad_id, dropout=0.0))
    # Two head starts: some heads prefer a neighbour, and the output bias knows token frequencies.
    start_locally(model.sentence_encoder.relative_attention_bias)
    counts_V = torch.tensor(tokens).bincount(minlength=vocabulary.size) + 0.1
    model.lm_head.bias.data = (counts_V / counts_V.sum()).log()
    config = OptimizationConfig(lr=3e-3, total_updates=updates)
    optimizer = build_optimizer(model, config, torch.device("cpu"))

    # The loop. Batch, masks and learning rate depend only on the seed and the update's number.
    for update in range(updates):
        chosen = fold_in(SEED, "batch", update).choice(len(sequences), BATCH_SIZE)
        batch = collate([collator.NumberedSequence(sequences[i], update, i) for i in chosen])
        loss = model.loss_sum(batch) / batch.num_predicted
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        set_learning_rate(optimizer, learning_rate(update, config))
        optimizer.step()
        if update % 20 == 0 or update == updates - 1:
            print(f"update {update}: {loss.item() / np.log(2):.2f} bits per predicted token")

    # The result: a vector for each token in its context.
    hidden_BLD = model.eval().encode(batch.input_ids, batch.attention_mask)
    print("hidden states:", tuple(hidden_BLD.shape))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
