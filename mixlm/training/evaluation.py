"""What a pretraining model has learned, on documents it has not seen."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..heads import IGNORE
from ..progress import progress_bar
from .objectives import Batch, gather_rows
from .sharding import Engine

# Held-out text is always masked alike, at BERT's rate, so that runs with different masking can be compared.
EVALUATION_MASKING_PROBABILITY, EVALUATION_MASKING = 0.15, "ngram"
RECALL_CHUNK = 1024  # queries that are scored against all contexts at once


def unigram_log_probabilities(token_counts: np.ndarray) -> Tensor:
    """log p(token) of a model that knows only how often each token occurs, with one added to each count.

    `token_counts` is [vocabulary]; the cross-entropy of this model on the masked tokens is the loss to beat.
    """
    counts = torch.from_numpy(np.asarray(token_counts, dtype=np.float64)) + 1
    return (counts / counts.sum()).log().float()


@torch.no_grad()
def evaluate_pretraining(
    engine: Engine, batches: Iterable[tuple[Batch, bool]], accelerator: Accelerator, unigram: Tensor
) -> dict[str, float]:
    """Metrics over all ranks' held-out batches.

    Args:
        engine: of a ForPreTraining model, in evaluation mode.
        batches: this rank's share, from `evaluation_batches`.
        accelerator: adds up over ranks.
        unigram: from `unigram_log_probabilities`, [vocabulary].

    Returns:
        mlm_loss (nats per masked token), mlm_accuracy, perplexity, unigram_loss, examples; and sop_accuracy, or
        ict_recall@1: how often a query's own context scores highest among the contexts of all held-out examples.
    """
    unigram = unigram.to(accelerator.device)
    names = ("loss", "unigram_loss", "correct", "tokens", "orders_correct", "orders", "examples")
    sums = {name: torch.zeros((), dtype=torch.float64, device=accelerator.device) for name in names}
    queries, contexts = [], []
    for batch, counts in progress_bar(batches, desc="evaluating", leave=False):
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        outputs = engine(**batch)
        if not counts:
            continue
        labels = [batch[name][batch[name] != IGNORE] for name in ("labels", "context_labels") if name in batch]
        targets = torch.cat(labels)
        sums["loss"] += outputs.mlm_loss * len(targets)
        sums["unigram_loss"] -= unigram[targets].sum()
        sums["correct"] += (outputs.prediction_logits.argmax(dim=-1) == targets).sum()
        sums["tokens"] += len(targets)
        sums["examples"] += len(batch["input_ids"])
        if outputs.sop_logits is not None:
            order = batch["sentence_order_label"]
            is_scored = order != IGNORE
            sums["orders_correct"] += (outputs.sop_logits.argmax(dim=-1) == order)[is_scored].sum()
            sums["orders"] += is_scored.sum()
        else:
            queries.append(outputs.embeddings)
            contexts.append(outputs.context_embeddings)

    totals = accelerator.reduce(torch.stack(list(sums.values())).float(), "sum").tolist()
    total = dict(zip(names, totals, strict=True))
    tokens = max(total["tokens"], 1)
    metrics = {
        "mlm_loss": total["loss"] / tokens,
        "mlm_accuracy": total["correct"] / tokens,
        "perplexity": math.exp(min(total["loss"] / tokens, 700)),
        "unigram_loss": total["unigram_loss"] / tokens,
        "examples": total["examples"],
    }
    config = engine.config
    if config.pretraining_objective == "ict":
        none = torch.empty(0, config.hidden_size, device=accelerator.device)  # a rank can be left without a batch
        all_queries, _ = gather_rows(accelerator, torch.cat([none, *queries]).float())
        all_contexts, _ = gather_rows(accelerator, torch.cat([none, *contexts]).float())
        return {**metrics, "ict_recall@1": recall_at_1(all_queries, all_contexts)}
    return {**metrics, "sop_accuracy": total["orders_correct"] / max(total["orders"], 1)}


def recall_at_1(queries: Tensor, contexts: Tensor) -> float:
    """The share of queries [n, hidden] whose inner product is highest with the context [n, hidden] of their number."""
    hits = 0
    for first in range(0, len(queries), RECALL_CHUNK):
        best = (queries[first : first + RECALL_CHUNK] @ contexts.T).argmax(dim=1)
        hits += int((best == torch.arange(first, first + len(best), device=best.device)).sum())
    return hits / max(len(queries), 1)
