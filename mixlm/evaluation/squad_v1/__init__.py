"""The folder that `evaluate.load` takes for EM and F1 of SQuAD 1.1."""
