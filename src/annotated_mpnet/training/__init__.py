"""Training: from a model and batches to a run that can be stopped, resumed and trusted."""
