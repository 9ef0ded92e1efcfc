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
from torch.nn.functional import cross_entropy, pad

from ..data.retrieval import EMPTY_PASSAGE
from ..heads import IGNORE, retrieval_scores
from ..modeling_switch import routing_counts
from .sharding import Engine

Batch = dict[str, Tensor]

# Inner products of queries and contexts that are in memory at once, 17 bytes each, however large the global batch is.
SCORES_AT_ONCE = 2**22


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
    """The global in-batch retrieval loss, the share of queries whose own context scores highest, how many candidates a
    query has in the mean, and the gradients of the loss by [rows, hidden] embeddings."""

    loss: Tensor
    accuracy: Tensor
    candidates: Tensor
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


class RetrievalObjective(Objective):
    """In-batch retrieval whose negatives are the contexts of the global batch: all micro-batches of all ranks.

    With several micro-batches the embeddings are computed twice (gradient caching, arXiv:2101.06983): first without
    gradient, to get the loss over the global batch and its gradient by every embedding; then micro-batch by
    micro-batch with gradient, from the same random state, so that memory is that of one micro-batch.

    A batch has `input_ids` and `context_input_ids` with their masks. With hard negatives it has `context_first_rows`,
    as `RetrievalHeads.forward` has it. With `passage` [batch] and `context_passage` [contexts], the numbers of
    passages, each passage is one candidate of a query, however often it is in the batch; so no two questions about a
    passage are negatives of each other.

    Args:
        temperature: scores are divided by it.
        empty_passage: token ids of a passage without text, [length], which every step has as one more candidate; its
            number is `EMPTY_PASSAGE`. None = none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        engine: Engine,
        temperature: float = 1.0,
        empty_passage: Tensor | None = None,
    ):
        super().__init__(accelerator, engine)
        self.temperature, self.empty_passage = temperature, empty_passage

    def weights(self, batch: Batch) -> dict[str, int]:
        """As in `Objective.weights`; queries and contexts are routed alike."""
        queries = len(batch["input_ids"])
        return {"ict": queries, "aux": queries + len(batch["context_input_ids"])}

    def begin_step(self, micro_batches: list[Batch]) -> Step:
        """Add the weights over all ranks and, with several micro-batches, compute the gradients of the embeddings.

        The first of the micro-batches of the main process becomes one with the empty passage.
        """
        if self.empty_passage is not None and self.accelerator.is_main_process:
            micro_batches[0] = with_context(micro_batches[0], self.empty_passage, EMPTY_PASSAGE)
        step = super().begin_step(micro_batches)
        if len(micro_batches) > 1:
            queries, contexts = [], []
            with torch.no_grad():
                for batch in micro_batches:
                    step.random_states.append(_random_state(self.accelerator.device))
                    outputs = self.engine(**self._inputs_of_embeddings(batch))
                    queries.append(outputs.embeddings)
                    contexts.append(outputs.context_embeddings)
            gradients = self._retrieval_gradients(torch.cat(queries), torch.cat(contexts), micro_batches)
            shares = zip(
                gradients.queries.split([len(part) for part in queries]),
                gradients.contexts.split([len(part) for part in contexts]),
                strict=True,
            )
            step.retrieval = [gradients._replace(queries=query, contexts=context) for query, context in shares]
        return step

    def loss(self, batch: Batch, number: int, step: Step) -> tuple[Tensor, dict[str, Term]]:
        """As in `Objective.loss`."""
        if step.random_states:
            _set_random_state(step.random_states[number], self.accelerator.device)
        outputs = self._forward(self._inputs(batch))
        if step.retrieval:
            gradients = step.retrieval[number]
        else:
            embeddings = (outputs.embeddings.detach(), outputs.context_embeddings.detach())
            gradients = self._retrieval_gradients(*embeddings, [batch])
        weights = step.weights[number]
        losses = {name: getattr(outputs, f"{name}_loss", None) for name in weights if name != "ict"}
        terms = self._terms(losses, weights)
        # The gradient of this inner product by the embeddings is the gradient of the global loss.
        by_queries = (outputs.embeddings * gradients.queries).sum()
        by_contexts = (outputs.context_embeddings * gradients.contexts).sum()
        share = by_queries + by_contexts
        if terms:
            share = share + self._share(terms, step)
        terms["ict"] = Term(gradients.loss * weights["ict"], weights["ict"])
        terms["ict_accuracy"] = Term(gradients.accuracy * weights["ict"], weights["ict"])
        terms["ict_candidates"] = Term(gradients.candidates * weights["ict"], weights["ict"])
        return share, {**terms, **self._routing_terms(outputs, batch)}

    def _inputs(self, batch: Batch) -> Batch:
        """What the model takes of a batch."""
        return {name: tensor for name, tensor in batch.items() if not name.endswith("passage")}

    def _inputs_of_embeddings(self, batch: Batch) -> Batch:
        """What it takes where only embeddings are wanted."""
        return self._inputs(batch)

    def _retrieval_gradients(
        self, queries: Tensor, contexts: Tensor, micro_batches: list[Batch]
    ) -> RetrievalGradients:
        """The loss over the global batch, from this rank's embeddings of its micro-batches."""
        all_queries, first = gather_rows(self.accelerator, queries.float())
        all_contexts, first_context = gather_rows(self.accelerator, contexts.float())
        own, before = [], first_context
        for batch in micro_batches:
            rows = len(batch["context_input_ids"])
            places = batch.get("context_first_rows")
            own.append(before + (torch.arange(rows, device=queries.device) if places is None else places))
            before += rows
        all_own, _ = gather_rows(self.accelerator, torch.cat(own))
        passages = None
        if "passage" in micro_batches[0]:
            passages = tuple(
                gather_rows(self.accelerator, torch.cat([batch[name] for batch in micro_batches]))[0]
                for name in ("passage", "context_passage")
            )
        whole = retrieval_gradients(all_queries, all_contexts, all_own, passages, self.temperature)
        return whole._replace(
            queries=whole.queries[first : first + len(queries)],
            contexts=whole.contexts[first_context : first_context + len(contexts)],
        )


class InverseClozeObjective(RetrievalObjective):
    """MLM and ICT."""

    def weights(self, batch: Batch) -> dict[str, int]:
        """As in `Objective.weights`; the masked tokens are those of query and context."""
        masked = int((batch["labels"] != IGNORE).sum() + (batch["context_labels"] != IGNORE).sum())
        return {"mlm": masked, **super().weights(batch)}

    def _inputs_of_embeddings(self, batch: Batch) -> Batch:
        """With no token to be predicted: the MLM head, which the embeddings do not need, has nothing to do."""
        return {
            name: torch.full_like(tensor, IGNORE) if name.endswith("labels") else tensor
            for name, tensor in batch.items()
        }


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


def with_context(batch: Batch, input_ids: Tensor, passage: int) -> Batch:
    """The batch with one more context, [length], which is that passage."""
    ids, mask = batch["context_input_ids"], batch["context_attention_mask"]
    # An array of one row more: what lies behind the passage is masked, whatever it is.
    row = pad(input_ids, (0, ids.shape[1] - len(input_ids))).to(ids)
    seen = (torch.arange(ids.shape[1], device=ids.device) < len(input_ids)).to(mask)
    first_rows = batch.get("context_first_rows", torch.arange(len(ids), device=ids.device))
    return {
        **batch,
        "context_input_ids": torch.cat([ids, row[None]]),
        "context_attention_mask": torch.cat([mask, seen[None]]),
        "context_passage": torch.cat([batch["context_passage"], batch["context_passage"].new_tensor([passage])]),
        "context_first_rows": first_rows,
    }


def retrieval_gradients(
    queries: Tensor,
    contexts: Tensor,
    own: Tensor,
    passages: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> RetrievalGradients:
    """The in-batch retrieval loss and its gradients, in memory that grows with the rows and not with their square.

    The loss is a sum over queries, so some of them at a time are scored with all contexts.

    Args:
        queries: embeddings, [queries, hidden], float32.
        contexts: likewise, [contexts, hidden].
        own: the context that is each query's own, [queries].
        passages: the numbers of the passages of queries and of contexts, [queries] and [contexts], for
            `repeated_candidates`. None = every context is a candidate.
        temperature: scores are divided by it.
    """
    rows_at_once = max(SCORES_AT_ONCE // len(contexts), 1)
    loss, correct, left_out = queries.new_zeros(()), own.new_zeros(()), own.new_zeros(())
    by_queries, by_contexts = torch.empty_like(queries), torch.zeros_like(contexts)
    contexts = contexts.detach().requires_grad_()
    for first in range(0, len(queries), rows_at_once):
        rows = slice(first, first + rows_at_once)
        some, targets = queries[rows].detach().requires_grad_(), own[rows]
        with torch.enable_grad():
            scores = retrieval_scores(some, contexts) / temperature
            if passages is not None:
                excluded = repeated_candidates(passages[0][rows], passages[1], targets)
                left_out += excluded.sum()
                scores = scores.masked_fill(excluded, -torch.inf)
            share = cross_entropy(scores, targets, reduction="sum") / len(queries)
            by_queries[rows], by_these = torch.autograd.grad(share, (some, contexts))
        by_contexts += by_these
        loss += share.detach()
        correct += (scores.detach().argmax(dim=1) == targets).sum()
    candidates = len(contexts) - left_out / len(queries)
    return RetrievalGradients(loss, correct / len(queries), candidates, by_queries, by_contexts)


def repeated_candidates(passage: Tensor, context_passage: Tensor, own: Tensor) -> Tensor:
    """Which contexts are no candidates of a query, because their passage is one already, [queries, contexts].

    Args:
        passage: the number of each query's own passage, [queries].
        context_passage: of each context, [contexts].
        own: the context that is each query's own, [queries]; it is a candidate, and no other of its passage is.
    """
    numbers, order = context_passage.sort(stable=True)
    occurred_before = torch.zeros_like(numbers, dtype=torch.bool)
    occurred_before[order[1:]] = numbers[1:] == numbers[:-1]
    excluded = (context_passage[None, :] == passage[:, None]) | occurred_before[None, :]
    return excluded.scatter(1, own[:, None], False)


def gather_rows(accelerator: Accelerator, rows: Tensor) -> tuple[Tensor, int]:
    """The rows [rows, ...] of all ranks, in order of rank, and where this rank's own begin.

    Ranks may have different numbers of rows.
    """
    rows = rows.detach()
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
