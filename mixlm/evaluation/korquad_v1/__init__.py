"""The folder that `evaluate.load` takes for EM and F1 of KorQuAD 1.0."""
