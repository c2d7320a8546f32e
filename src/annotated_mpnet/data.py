"""The collator, under the name by which users of annotated-mpnet import it."""

from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling

__all__ = ["DataCollatorForMaskedPermutedLanguageModeling"]
