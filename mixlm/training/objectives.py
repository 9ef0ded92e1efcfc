"""What an optimizer step minimises.

A loss is a (sum, weight) pair until the whole step's weight is known: weights are added over micro-batches and ranks
first, and every micro-batch then contributes its sum over that total. So 1 x 32 rows, 4 x 8 rows and 2 ranks x 16 rows
give the same gradient.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..heads import IGNORE, in_batch_retrieval_loss
from ..modeling_switch import routing_counts
from .sharding import Engine

Batch = dict[str, Tensor]


class Term(NamedTuple):
    """A quantity as a sum and what the sum is to be divided by."""

    sum: Tensor
    weight: Tensor | float


@dataclass
class Step:
    """What the micro-batches of one optimizer step need to know of each other.

    Args:
        weights: of each micro-batch of this rank, the weight of each loss.
        totals: the weight of each loss over all micro-batches and ranks.
        retrieval: ICT with several micro-batches: for each the loss and the gradients of its embeddings.
        random_states: the state of the random generators with which those were computed.
    """

    weights: list[dict[str, int]]
    totals: dict[str, float]
    retrieval: list["RetrievalGradients"] = field(default_factory=list)
    random_states: list[list[Tensor]] = field(default_factory=list)


class RetrievalGradients(NamedTuple):
    """The global in-batch retrieval loss and its gradients by this rank's [rows, hidden] embeddings."""

    loss: Tensor
    queries: Tensor
    contexts: Tensor


class Objective(ABC):
    """A subclass says which losses there are, what each weighs in a micro-batch, and how they are computed.

    Args:
        accelerator: the process group.
        engine: to be called as the model.
    """

    def __init__(self, accelerator: Accelerator, engine: Engine):
        self.accelerator, self.engine = accelerator, engine
        self.capacity_factor = getattr(engine.config, "capacity_factor", None)

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, int]:
        """What each loss of a micro-batch weighs: MLM masked tokens, all others rows."""

    @abstractmethod
    def loss(self, batch: Batch, number: int, step: Step) -> tuple[Tensor, dict[str, Term]]:
        """This micro-batch's share of the step's loss, to be backpropagated, and its terms for the curves.

        Args:
            batch: micro-batch `number` of this rank in this step.
            step: what `begin_step` returned.
        """

    def begin_step(self, micro_batches: list[Batch]) -> Step:
        """Add the weights of this rank's micro-batches over all ranks."""
        by_batch = [self.weights(batch) for batch in micro_batches]
        names = list(by_batch[0])
        own = torch.tensor([sum(weights[name] for weights in by_batch) for name in names], dtype=torch.float32)
        total = self.accelerator.reduce(own.to(self.accelerator.device), "sum").tolist()
        return Step(by_batch, dict(zip(names, total, strict=True)))

    def _forward(self, batch: Batch):
        return self.engine(**batch, **({} if self.capacity_factor is None else {"output_router_logits": True}))

    @staticmethod
    def _terms(losses: dict[str, Tensor | None], weights: dict[str, int]) -> dict[str, Term]:
        return {name: Term(loss * weights[name], weights[name]) for name, loss in losses.items() if loss is not None}

    @staticmethod
    def _share(terms: dict[str, Term], step: Step) -> Tensor:
        return torch.stack([term.sum / max(step.totals[name], 1) for name, term in terms.items()]).sum()

    def _routing_terms(self, outputs, batch: Batch) -> dict[str, Term]:
        """Switch: each expert's share of the tokens, and the share over capacity; for ICT those of the queries."""
        if self.capacity_factor is None:
            return {}
        logits = tuple(layer.detach() for layer in outputs.router_logits)
        chosen, dropped = routing_counts(logits, batch["attention_mask"], self.capacity_factor)
        tokens = chosen.sum()
        shares = {f"expert_{number}_share": Term(count, tokens) for number, count in enumerate(chosen)}
        return {**shares, "dropped_share": Term(dropped, tokens)}


class SentenceOrderObjective(Objective):
    """MLM and sentence order."""

    def weights(self, batch: Batch) -> dict[str, int]:
        """As in `Objective.weights`; a row of one sentence has no order."""
        return {
            "mlm": int((batch["labels"] != IGNORE).sum()),
            "sop": int((batch["sentence_order_label"] != IGNORE).sum()),
            "aux": len(batch["input_ids"]),
        }

    def loss(self, batch: Batch, number: int, step: Step) -> tuple[Tensor, dict[str, Term]]:
        """As in `Objective.loss`."""
        outputs = self._forward(batch)
        losses = {"mlm": outputs.mlm_loss, "sop": outputs.sop_loss, "aux": outputs.aux_loss}
        terms = self._terms(losses, step.weights[number])
        return self._share(terms, step), {**terms, **self._routing_terms(outputs, batch)}


class InverseClozeObjective(Objective):
    """MLM and ICT, whose negatives are the global batch: all micro-batches of all ranks.

    With several micro-batches the embeddings are computed twice (gradient caching, arXiv:2101.06983): first without
    gradient, to get the loss over the global batch and its gradient by every embedding; then micro-batch by
    micro-batch with gradient, from the same random state, so that memory is that of one micro-batch.
    """

    def weights(self, batch: Batch) -> dict[str, int]:
        """As in `Objective.weights`; the masked tokens are those of query and context."""
        masked = int((batch["labels"] != IGNORE).sum() + (batch["context_labels"] != IGNORE).sum())
        return {"mlm": masked, "ict": len(batch["input_ids"]), "aux": len(batch["input_ids"])}

    def begin_step(self, micro_batches: list[Batch]) -> Step:
        """Add the weights over all ranks and, with several micro-batches, compute the gradients of the embeddings."""
        step = super().begin_step(micro_batches)
        if len(micro_batches) > 1:
            queries, contexts = [], []
            with torch.no_grad():
                for batch in micro_batches:
                    step.random_states.append(_random_state(self.accelerator.device))
                    outputs = self.engine(**_without_labels(batch))
                    queries.append(outputs.embeddings)
                    contexts.append(outputs.context_embeddings)
            gradients = self._retrieval_gradients(torch.cat(queries), torch.cat(contexts))
            rows = [len(part) for part in queries]
            step.retrieval = [
                RetrievalGradients(gradients.loss, query, context)
                for query, context in zip(gradients.queries.split(rows), gradients.contexts.split(rows), strict=True)
            ]
        return step

    def loss(self, batch: Batch, number: int, step: Step) -> tuple[Tensor, dict[str, Term]]:
        """As in `Objective.loss`."""
        if step.random_states:
            _set_random_state(step.random_states[number], self.accelerator.device)
        outputs = self._forward(batch)
        if step.retrieval:
            gradients = step.retrieval[number]
        else:
            gradients = self._retrieval_gradients(outputs.embeddings.detach(), outputs.context_embeddings.detach())
        weights = step.weights[number]
        terms = self._terms({"mlm": outputs.mlm_loss, "aux": outputs.aux_loss}, weights)
        # The gradient of this inner product by the embeddings is the gradient of the global loss.
        by_queries = (outputs.embeddings * gradients.queries).sum()
        by_contexts = (outputs.context_embeddings * gradients.contexts).sum()
        share = self._share(terms, step) + by_queries + by_contexts
        terms["ict"] = Term(gradients.loss * weights["ict"], weights["ict"])
        return share, {**terms, **self._routing_terms(outputs, batch)}

    def _retrieval_gradients(self, queries: Tensor, contexts: Tensor) -> RetrievalGradients:
        all_queries, first = gather_rows(self.accelerator, queries)
        all_contexts, _ = gather_rows(self.accelerator, contexts)
        with torch.enable_grad():
            all_queries.requires_grad_()
            all_contexts.requires_grad_()
            loss = in_batch_retrieval_loss(all_queries, all_contexts)
            by_queries, by_contexts = torch.autograd.grad(loss, (all_queries, all_contexts))
        own = slice(first, first + len(queries))
        return RetrievalGradients(loss.detach(), by_queries[own], by_contexts[own])


class ReadingObjective(Objective):
    """The first and the last token of an answer; where a window has none, both are the first token of the window."""

    def weights(self, batch: Batch) -> dict[str, int]:
        """As in `Objective.weights`."""
        return {"reading": len(batch["input_ids"]), "aux": len(batch["input_ids"])}

    def loss(self, batch: Batch, number: int, step: Step) -> tuple[Tensor, dict[str, Term]]:
        """As in `Objective.loss`."""
        outputs = self._forward({name: tensor for name, tensor in batch.items() if name != "window"})
        aux_loss = getattr(outputs, "aux_loss", None)  # models of other libraries are trained too
        reading_loss = outputs.loss if aux_loss is None else outputs.loss - aux_loss
        terms = self._terms({"reading": reading_loss, "aux": aux_loss}, step.weights[number])
        return self._share(terms, step), {**terms, **self._routing_terms(outputs, batch)}


def _without_labels(batch: Batch) -> Batch:
    """The batch with no token to be predicted: the MLM head, which the embeddings do not need, has nothing to do."""
    return {
        name: torch.full_like(tensor, IGNORE) if name.endswith("labels") else tensor for name, tensor in batch.items()
    }


def gather_rows(accelerator: Accelerator, rows: Tensor) -> tuple[Tensor, int]:
    """The float32 rows [rows, hidden] of all ranks, in order of rank, and where this rank's own begin.

    Ranks may have different numbers of rows.
    """
    rows = rows.detach().float()
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = accelerator.pad_across_processes(rows, dim=0)
    by_rank = accelerator.gather(padded).split(max(counts))
    gathered = torch.cat([part[:count] for part, count in zip(by_rank, counts, strict=True)])
    return gathered, sum(counts[: accelerator.process_index])


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
