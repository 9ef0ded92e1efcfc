"""The heads of both families: what they compute, their losses, and the inputs they refuse."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle, mean_cross_entropy, random_batch, small_model

from mixlm import (
    MixLMForMaskedLM,
    MixLMForPreTraining,
    MixLMForQuestionAnswering,
    MixLMForRetrieval,
    MixLMSwitchForMaskedLM,
    MixLMSwitchForPreTraining,
    MixLMSwitchForQuestionAnswering,
    MixLMSwitchForRetrieval,
)
from mixlm.heads import classification_loss, masked_lm_loss, position_loss, retrieval_scores

MASKED_LM = pytest.mark.parametrize("model_class", [MixLMForMaskedLM, MixLMSwitchForMaskedLM])
QUESTION_ANSWERING = pytest.mark.parametrize(
    "model_class", [MixLMForQuestionAnswering, MixLMSwitchForQuestionAnswering]
)
RETRIEVAL = pytest.mark.parametrize("model_class", [MixLMForRetrieval, MixLMSwitchForRetrieval])
PRETRAINING = pytest.mark.parametrize("model_class", [MixLMForPreTraining, MixLMSwitchForPreTraining])
# Losses are computed in float32, also in a float64 model.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def build(model_class, **fields):
    return small_model(model_class, num_hidden_layers=2, **fields)


def sparse_labels(batch, offset=0):
    """Labels at every third real token: 0 is a label like any other."""
    place = torch.arange(batch["input_ids"].shape[1]) + offset
    return torch.where((place % 3 == 1) & batch["attention_mask"].bool(), batch["input_ids"] % 5, -100)


def sop_batch(config, lengths=(7, 5, 6)):
    batch = random_batch(config, list(lengths))
    return {**batch, "labels": sparse_labels(batch), "sentence_order_label": torch.arange(len(lengths)) % 2}


def ict_batch(config, lengths=(3, 2, 4), context_lengths=(7, 8, 5)):
    query, context = random_batch(config, list(lengths)), random_batch(config, list(context_lengths), seed=1)
    return {
        **query,
        "labels": sparse_labels(query),
        "context_input_ids": context["input_ids"],
        "context_attention_mask": context["attention_mask"],
        "context_labels": sparse_labels(context, offset=1),
    }


AUX = {"output_router_logits": True}  # without it Switch has its aux_loss in training alone; MixLM has none


def aux(output):
    return 0 if output.aux_loss is None else output.aux_loss


def same(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), **CLOSE)


class TestMaskedLM:
    @MASKED_LM
    def test_training_computes_labelled_positions_alone(self, model_class):
        model = build(model_class, dropout_prob=0.0).train()
        batch = random_batch(model.config, [7, 4])
        labels = sparse_labels(batch)
        everywhere = model(**batch).logits
        assert everywhere.shape == (2, 7, model.config.vocab_size)
        computed = []
        model.mlm_head.decoder.register_forward_hook(lambda module, args, output: computed.append(output.shape))
        output = model(**batch, labels=labels)
        assert computed == [((labels != -100).sum(), model.config.vocab_size)]
        same(output.logits, everywhere[labels != -100])

    @MASKED_LM
    def test_evaluation_gives_the_logits_of_all_positions(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 4])
        same(model(**batch, labels=sparse_labels(batch)).logits, model(**batch).logits)

    @MASKED_LM
    def test_loss_and_gradient_are_those_of_all_positions(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 4])
        labels = sparse_labels(batch)
        everywhere = model(**batch)
        expected = F.cross_entropy(everywhere.logits.flatten(0, 1), labels.flatten()) + aux(everywhere)
        output = model(**batch, labels=labels)
        same(output.loss, expected)
        same(output.mlm_loss + aux(output), output.loss)
        parameters = list(model.parameters())
        for ours, theirs in zip(
            torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    @MASKED_LM
    def test_logits_equal_the_plain_form(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [6, 6])
        oracle = Oracle(model)
        same(model(**batch).logits, oracle.mlm_logits(oracle.encode(**batch).last_hidden_state))

    @MASKED_LM
    def test_decoder_is_tied(self, model_class):
        model = build(model_class)
        assert model.mlm_head.decoder.weight is model.encoder.embeddings.word_embeddings.weight
        assert "mlm_head.decoder.bias" in dict(model.named_parameters()), "its bias is its own"

    @MASKED_LM
    def test_labels_of_another_shape(self, model_class):
        model = build(model_class)
        with pytest.raises(ValueError, match=r"labels have shape \(2, 5\), the input has \(2, 6\)"):
            model(torch.zeros(2, 6, dtype=torch.long), labels=torch.zeros(2, 5, dtype=torch.long))

    @MASKED_LM
    def test_no_labelled_token(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [6, 6])
        labels = torch.full_like(batch["input_ids"], -100)
        output = model(**batch, labels=labels)
        assert output.mlm_loss.item() == 0
        same(output.loss, output.mlm_loss + aux(output))
        assert model.train()(**batch, labels=labels).logits.shape == (0, model.config.vocab_size)
        output.mlm_loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or (parameter.grad == 0).all(), name

    @MASKED_LM
    def test_without_labels_there_is_no_loss(self, model_class):
        model = build(model_class)
        output = model(**random_batch(model.config, [6, 6]))
        assert output.loss is None and output.mlm_loss is None


class TestQuestionAnswering:
    @QUESTION_ANSWERING
    def test_loss(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 4])
        start, end = torch.tensor([2, 0]), torch.tensor([6, 3])
        output = model(**batch, start_positions=start, end_positions=end)
        assert output.start_logits.shape == output.end_logits.shape == (2, 7)
        expected = 0
        for logits, positions in ((output.start_logits, start), (output.end_logits, end)):
            for row, position, length in zip(logits, positions, (7, 4), strict=True):
                expected = expected - row[:length].log_softmax(dim=0)[position] / 4
        same(output.loss, expected + aux(output))

    @QUESTION_ANSWERING
    def test_logits_equal_the_plain_form(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 7])
        oracle = Oracle(model)
        logits = oracle.linear(oracle.encode(**batch).last_hidden_state, "qa_outputs")
        output = model(**batch)
        same(output.start_logits, logits[..., 0])
        same(output.end_logits, logits[..., 1])

    @QUESTION_ANSWERING
    def test_positions_of_shape_batch_by_one(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 4])
        start, end = torch.tensor([2, 0]), torch.tensor([6, 3])
        flat = model(**batch, start_positions=start, end_positions=end).loss
        same(model(**batch, start_positions=start[:, None], end_positions=end[:, None]).loss, flat)

    @QUESTION_ANSWERING
    @pytest.mark.parametrize("outside", [-1, -100, 7, 8, 512, 4, 6])  # the second text has four tokens and padding
    def test_positions_outside_the_text_are_not_scored(self, model_class, outside):
        model = build(model_class, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
        batch = random_batch(model.config, [7, 4])
        first = {name: tensor[:1] for name, tensor in batch.items()}
        expected = model(**first, start_positions=torch.tensor([2]), end_positions=torch.tensor([5])).loss
        given = torch.tensor([2, outside]), torch.tensor([5, outside])
        same(model(**batch, start_positions=given[0], end_positions=given[1]).loss, expected)
        assert given[0].tolist() == [2, outside], "the caller's labels are left alone"

    @QUESTION_ANSWERING
    def test_start_and_end_are_scored_apart(self, model_class):
        """A start outside and an end inside: the mean of start and end is over what each has."""
        model = build(model_class)
        batch = random_batch(model.config, [7, 7])
        output = model(**batch, start_positions=torch.tensor([1, -1]), end_positions=torch.tensor([3, 4]))
        start = mean_cross_entropy(output.start_logits, torch.tensor([1, -100]))
        end = mean_cross_entropy(output.end_logits, torch.tensor([3, 4]))
        same(output.loss, (start + end) / 2 + aux(output))

    @QUESTION_ANSWERING
    def test_no_position_inside(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 4])
        outside = torch.tensor([-1, 99])
        output = model(**batch, start_positions=outside, end_positions=outside)
        same(output.loss, torch.as_tensor(aux(output)))
        output.loss.backward()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
        assert (model.qa_outputs.weight.grad == 0).all()

    @QUESTION_ANSWERING
    @pytest.mark.parametrize("given", ["start_positions", "end_positions"])
    def test_half_a_label_is_an_error(self, model_class, given):
        model = build(model_class)
        lacking = ({"start_positions", "end_positions"} - {given}).pop()
        with pytest.raises(ValueError, match=f"question answering needs {lacking} beside {given}"):
            model(**random_batch(model.config, [6]), **{given: torch.tensor([1])})

    @QUESTION_ANSWERING
    def test_without_labels_there_is_no_loss(self, model_class):
        model = build(model_class)
        assert model(**random_batch(model.config, [6, 6])).loss is None


class TestPoolers:
    @RETRIEVAL
    @pytest.mark.parametrize("pooler", ["decoder", "mean", "cls"])
    def test_hand_computed(self, model_class, pooler):
        model = build(model_class, pooler=pooler)
        batch = random_batch(model.config, [5, 2])
        hidden = model.encoder(**batch).last_hidden_state
        if pooler == "cls":
            expected = torch.stack([hidden[0, 0], hidden[1, 0]])
        elif pooler == "mean":
            expected = torch.stack([hidden[0].sum(dim=0) / 5, (hidden[1, 0] + hidden[1, 1]) / 2])
        else:
            with torch.no_grad():
                model.pooler.weight.copy_(torch.arange(20) + 1)
            first = hidden[0, 0] + 2 * hidden[0, 1] + 3 * hidden[0, 2] + 4 * hidden[0, 3] + 5 * hidden[0, 4]
            expected = torch.stack([first, hidden[1, 0] + 2 * hidden[1, 1]])
        same(model(**batch).embeddings, expected)

    @RETRIEVAL
    def test_decoder_has_a_weight_per_position(self, model_class):
        model = build(model_class, pooler="decoder")
        assert model.pooler.weight.shape == (model.config.max_position_embeddings,)
        assert not list(build(model_class, pooler="mean").pooler.parameters())

    @RETRIEVAL
    def test_default_is_the_decoder(self, model_class):
        assert model_class.config_class().pooler == "decoder"


class TestRetrieval:
    @RETRIEVAL
    @pytest.mark.parametrize("pooler", ["decoder", "mean", "cls"])
    def test_loss(self, model_class, pooler):
        model = build(model_class, pooler=pooler)
        batch = ict_batch(model.config)
        del batch["labels"], batch["context_labels"]
        output = model(**batch)
        queries, contexts = output.embeddings, output.context_embeddings
        assert queries.shape == contexts.shape == (3, model.config.hidden_size)
        expected = 0
        for i in range(3):
            scores = [(queries[i] * contexts[j]).sum().item() for j in range(3)]
            largest = max(scores)
            expected += (math.log(sum(math.exp(score - largest) for score in scores)) + largest - scores[i]) / 3
        assert output.loss.item() == pytest.approx(expected + torch.as_tensor(aux(output)).item(), rel=1e-5, abs=1e-5)

    @RETRIEVAL
    def test_texts_that_look_alike_have_a_loss_of_log_batch(self, model_class):
        model = build(model_class, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
        with torch.no_grad():
            model.pooler.weight.zero_()
        batch = ict_batch(model.config)
        del batch["labels"], batch["context_labels"]
        assert model(**batch).loss.item() == pytest.approx(math.log(3))

    @RETRIEVAL
    def test_query_and_context_are_encoded_separately(self, model_class):
        model = build(model_class)
        batch = ict_batch(model.config)
        query = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        output = model(**query, context_input_ids=batch["context_input_ids"][:, :5], **AUX)
        same(output.embeddings, model(**query).embeddings)
        same(output.context_embeddings, model(batch["context_input_ids"][:, :5]).embeddings)
        if output.aux_loss is not None:  # a text weighs the same wherever it stands
            alone = model(**query, **AUX).aux_loss, model(batch["context_input_ids"][:, :5], **AUX).aux_loss
            same(output.aux_loss, sum(alone) / 2)

    @RETRIEVAL
    def test_queries_and_contexts_are_also_encoded_alone(self, model_class):
        model = build(model_class)
        batch = ict_batch(model.config)
        query = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        context = {name: batch[name] for name in ("context_input_ids", "context_attention_mask")}
        both, queries, contexts = model(**query, **context), model(**query), model(**context)
        same(queries.embeddings, both.embeddings)
        same(contexts.context_embeddings, both.context_embeddings)
        assert contexts.loss is None and contexts.embeddings is None
        assert queries.loss is None and queries.context_embeddings is None

    @RETRIEVAL
    def test_the_vector_of_padding_alone_is_a_number(self, model_class):
        model = build(model_class, normalize_embeddings=True, pooler="mean").half()
        batch = random_batch(model.config, [6, 6])
        batch["attention_mask"][1] = 0
        vectors = model(**batch).embeddings
        assert vectors.dtype == torch.half and vectors.isfinite().all()
        assert vectors[0].float().norm().item() == pytest.approx(1, abs=1e-3)

    @RETRIEVAL
    @pytest.mark.parametrize("pooler", ["decoder", "mean", "cls"])
    def test_in_a_mask_what_is_not_0_is_a_token(self, model_class, pooler):
        model = build(model_class, pooler=pooler)
        batch = random_batch(model.config, [6, 4])
        expected = model(**batch, **AUX)
        batch["attention_mask"] = torch.arange(1, 7) * batch["attention_mask"]
        found = model(**batch, **AUX)
        same(found.embeddings, expected.embeddings)
        same(torch.as_tensor(aux(found)), torch.as_tensor(aux(expected)))

    @RETRIEVAL
    def test_hard_negatives_stand_behind_the_own_context(self, model_class):
        model = build(model_class)
        batch = ict_batch(model.config, context_lengths=(7, 8, 5, 6, 3))
        del batch["labels"], batch["context_labels"]
        own = [0, 2, 3]
        output = model(**batch, **AUX, context_first_rows=torch.tensor(own))
        scores = (output.embeddings @ output.context_embeddings.T).tolist()
        expected = 0
        for row, place in zip(scores, own, strict=True):
            expected += math.log(sum(math.exp(score - row[place]) for score in row)) / 3
        assert output.loss.item() == pytest.approx(expected + torch.as_tensor(aux(output)).item(), rel=1e-5)
        if output.aux_loss is not None:  # also where there are more contexts than queries
            query = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}, **AUX)
            context = model(batch["context_input_ids"], batch["context_attention_mask"], **AUX)
            same(output.aux_loss, (3 * query.aux_loss + 5 * context.aux_loss) / 8)

    @RETRIEVAL
    def test_without_hard_negatives_a_context_is_in_the_row_of_its_query(self, model_class):
        model = build(model_class)
        batch = ict_batch(model.config)
        del batch["labels"], batch["context_labels"]
        assert model(**batch).loss == model(**batch, context_first_rows=torch.arange(3)).loss

    @RETRIEVAL
    def test_vectors_of_norm_one(self, model_class):
        model = build(model_class, normalize_embeddings=True)
        batch = ict_batch(model.config)
        plain = build(model_class)
        output = model(**batch)
        for name in ("embeddings", "context_embeddings"):
            vectors = plain(**batch)[name]
            same(output[name].norm(dim=-1), torch.ones(3))
            same(output[name] * vectors.norm(dim=-1, keepdim=True), vectors)

    @RETRIEVAL
    def test_contexts_have_a_tower_of_their_own(self, model_class):
        model = build(model_class, two_towers=True)
        batch = ict_batch(model.config)
        output = model(**batch)
        inputs = batch["context_input_ids"], batch["context_attention_mask"]
        same(output.context_embeddings, model.pooler(model.context_encoder(*inputs).last_hidden_state, inputs[1]))
        assert not torch.allclose(output.context_embeddings, model(*inputs).embeddings)
        output.context_embeddings.sum().backward()
        assert model.encoder.embeddings.word_embeddings.weight.grad is None
        assert model.context_encoder.embeddings.word_embeddings.weight.grad.abs().max() > 0

    @RETRIEVAL
    def test_padding_changes_nothing_in_either_tower(self, model_class):
        model = build(model_class, two_towers=True, normalize_embeddings=True)
        padded = random_batch(model.config, [6, 3], padded_to=11)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        together = model(ids, mask, context_input_ids=ids, context_attention_mask=mask)
        for row, length in enumerate((6, 3)):
            alone = model(ids[row : row + 1, :length], context_input_ids=ids[row : row + 1, :length])
            same(together.embeddings[row : row + 1], alone.embeddings)
            same(together.context_embeddings[row : row + 1], alone.context_embeddings)

    @RETRIEVAL
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"context_first_rows": torch.tensor([0])}, "needs context_input_ids beside context_first_rows"),
            (
                {"context_input_ids": torch.ones(3, 4, dtype=torch.long)},
                "the retrieval loss of 2 queries and 3 contexts needs context_first_rows",
            ),
        ],
    )
    def test_contexts_that_fit_no_queries_are_an_error(self, model_class, given, message):
        model = build(model_class)
        with pytest.raises(ValueError, match=message):
            model(torch.ones(2, 4, dtype=torch.long), **given)

    @RETRIEVAL
    def test_mask_without_context_is_an_error(self, model_class):
        model = build(model_class)
        batch = ict_batch(model.config)
        with pytest.raises(ValueError, match="context_input_ids.*context_attention_mask"):
            model(batch["input_ids"], context_attention_mask=batch["context_attention_mask"])

    @RETRIEVAL
    def test_without_context_there_is_no_loss(self, model_class):
        model = build(model_class)
        output = model(**random_batch(model.config, [6, 6]))
        assert output.loss is None and output.context_embeddings is None
        assert output.embeddings.shape == (2, 24)


class TestSentenceOrderPretraining:
    @PRETRAINING
    def test_loss_is_composed_of_its_parts(self, model_class):
        model = build(model_class)
        batch = sop_batch(model.config)
        output = model(**batch, **AUX)
        same(output.loss, output.mlm_loss + output.sop_loss + aux(output))
        assert output.ict_loss is None
        assert (output.aux_loss is None) == (model.config.model_type == "mixlm")
        labels = batch["labels"]
        same(output.mlm_loss, mean_cross_entropy(output.prediction_logits, labels[labels != -100]))
        same(output.sop_loss, mean_cross_entropy(output.sop_logits, batch["sentence_order_label"]))

    @PRETRAINING
    def test_logits_equal_the_plain_form(self, model_class):
        model = build(model_class)
        batch = random_batch(model.config, [7, 7])
        oracle = Oracle(model)
        hidden = oracle.encode(**batch).last_hidden_state
        output = model(**batch)
        same(output.prediction_logits, oracle.mlm_logits(hidden))
        same(output.sop_logits, oracle.sop_logits(hidden))

    @PRETRAINING
    def test_rows_of_minus_100_are_not_scored(self, model_class):
        model = build(model_class)
        batch = sop_batch(model.config)
        every_row = model(**batch)
        batch["sentence_order_label"] = torch.tensor([0, -100, 1])
        output = model(**batch)
        rows = output.sop_logits.log_softmax(dim=-1)
        same(output.sop_loss, -(rows[0, 0] + rows[2, 1]) / 2)
        same(output.mlm_loss, every_row.mlm_loss)

    @PRETRAINING
    def test_nothing_to_score(self, model_class):
        model = build(model_class)
        batch = sop_batch(model.config)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        batch["sentence_order_label"] = torch.full((3,), -100)
        output = model(**batch)
        assert output.mlm_loss.item() == output.sop_loss.item() == 0
        same(output.loss, torch.as_tensor(aux(output)))
        output.loss.backward()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())

    @PRETRAINING
    @pytest.mark.parametrize("given", ["labels", "sentence_order_label"])
    def test_a_lacking_label_is_an_error(self, model_class, given):
        model = build(model_class)
        batch = sop_batch(model.config)
        lacking = ({"labels", "sentence_order_label"} - {given}).pop()
        batch.pop(lacking)
        with pytest.raises(ValueError, match=f"the sop pretraining loss needs {lacking} beside {given}"):
            model(**batch)

    @PRETRAINING
    @pytest.mark.parametrize("foreign", ["context_input_ids", "context_attention_mask", "context_labels"])
    @pytest.mark.parametrize("training", [True, False], ids=["labels", "inference"])
    def test_inputs_of_ict_are_refused(self, model_class, foreign, training):
        model = build(model_class)
        batch = sop_batch(model.config) if training else random_batch(model.config, [7, 5, 6])
        with pytest.raises(ValueError, match=f"{foreign} given, but pretraining_objective is 'sop'"):
            model(**batch, **{foreign: ict_batch(model.config)[foreign]})

    @PRETRAINING
    def test_without_labels_there_is_no_loss(self, model_class):
        model = build(model_class)
        output = model(**random_batch(model.config, [6, 6]))
        assert output.loss is None and output.mlm_loss is None and output.sop_loss is None
        assert output.sop_logits.shape == (2, 2)


class TestInverseClozePretraining:
    def build(self, model_class, **fields):
        return build(model_class, pretraining_objective="ict", **fields)

    @PRETRAINING
    @pytest.mark.parametrize("pooler", ["decoder", "mean", "cls"])
    def test_loss_is_composed_of_its_parts(self, model_class, pooler):
        model = self.build(model_class, pooler=pooler)
        batch = ict_batch(model.config)
        output = model(**batch)
        same(output.loss, output.mlm_loss + output.ict_loss + aux(output))
        assert output.sop_loss is None and output.sop_logits is None
        scores = output.embeddings @ output.context_embeddings.T
        same(output.ict_loss, -sum(scores[i].log_softmax(dim=0)[i] for i in range(3)) / 3)

    @PRETRAINING
    def test_mlm_is_the_mean_over_the_tokens_of_query_and_context(self, model_class):
        model = self.build(model_class)
        batch = ict_batch(model.config)
        oracle = Oracle(model)
        query = oracle.encode(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        context = oracle.encode(batch["context_input_ids"], batch["context_attention_mask"])
        logits = [oracle.mlm_logits(encoded.last_hidden_state).flatten(0, 1) for encoded in (query, context)]
        labels = torch.cat([batch["labels"].flatten(), batch["context_labels"].flatten()])
        output = model(**batch)
        same(output.mlm_loss, mean_cross_entropy(torch.cat(logits), labels))
        same(output.prediction_logits, torch.cat(logits)[labels != -100])

    @PRETRAINING
    def test_embeddings_are_those_of_the_retrieval_model(self, model_class):
        model = self.build(model_class)
        retrieval = build(MixLMForRetrieval if model_class is MixLMForPreTraining else MixLMSwitchForRetrieval)
        retrieval.load_state_dict(
            {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mlm_head")}
        )
        batch = ict_batch(model.config)
        output = model(**batch)
        expected = retrieval(
            **{name: tensor for name, tensor in batch.items() if name not in ("labels", "context_labels")}
        )
        same(output.embeddings, expected.embeddings)
        same(output.context_embeddings, expected.context_embeddings)
        same(output.ict_loss + aux(output), expected.loss)

    @PRETRAINING
    def test_no_labelled_token(self, model_class):
        model = self.build(model_class)
        batch = ict_batch(model.config)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        batch["context_labels"] = torch.full_like(batch["context_labels"], -100)
        output = model(**batch)
        assert output.mlm_loss.item() == 0
        same(output.loss, output.ict_loss + aux(output))
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)

    @PRETRAINING
    def test_one_side_without_labelled_tokens(self, model_class):
        model = self.build(model_class)
        batch = ict_batch(model.config)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        labels = batch["context_labels"]
        output = model(**batch)
        same(output.mlm_loss, mean_cross_entropy(output.prediction_logits, labels[labels != -100]))

    @PRETRAINING
    @pytest.mark.parametrize(
        "given",
        [given for size in (1, 2) for given in combinations(("labels", "context_input_ids", "context_labels"), size)],
        ids="+".join,
    )
    def test_a_lacking_input_is_an_error(self, model_class, given):
        model = self.build(model_class)
        batch = ict_batch(model.config)
        for name in {"labels", "context_input_ids", "context_labels"} - set(given):
            del batch[name]
        with pytest.raises(ValueError, match="the ict pretraining loss needs .* beside") as caught:
            model(**batch)
        needs, beside = str(caught.value).split(" beside ")
        assert beside.split(", ") == list(given)
        assert {"labels", "context_input_ids", "context_labels"} == {*given, *needs.split(" needs ")[1].split(", ")}

    @PRETRAINING
    def test_context_mask_alone_is_an_error(self, model_class):
        model = self.build(model_class)
        batch = ict_batch(model.config)
        with pytest.raises(ValueError, match="context_attention_mask"):
            model(batch["input_ids"], context_attention_mask=batch["context_attention_mask"])

    @PRETRAINING
    @pytest.mark.parametrize("training", [True, False], ids=["labels", "inference"])
    def test_sentence_order_is_refused(self, model_class, training):
        model = self.build(model_class)
        batch = ict_batch(model.config) if training else random_batch(model.config, [3, 2, 4])
        with pytest.raises(ValueError, match="sentence_order_label given, but pretraining_objective is 'ict'"):
            model(**batch, sentence_order_label=torch.zeros(3, dtype=torch.long))

    @PRETRAINING
    def test_without_labels_there_is_no_loss(self, model_class):
        model = self.build(model_class)
        output = model(**random_batch(model.config, [6, 6]))
        assert output.loss is None and output.mlm_loss is None and output.ict_loss is None
        assert output.embeddings.shape == (2, 24)
        assert output.prediction_logits.shape == (2, 6, 31)


@PRETRAINING
@pytest.mark.parametrize("objective", ["sop", "ict"])
def test_only_the_layers_of_the_objective_exist(model_class, objective):
    model = build(model_class, pretraining_objective=objective)
    layers = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert layers == {"encoder", "mlm_head", "sop_head" if objective == "sop" else "pooler"}


@PRETRAINING
@pytest.mark.parametrize("objective", ["sop", "ict"])
def test_hidden_states_are_those_of_the_first_input(model_class, objective):
    model = build(model_class, pretraining_objective=objective)
    batch = sop_batch(model.config) if objective == "sop" else ict_batch(model.config)
    output = model(**batch, output_hidden_states=True)
    names = ("input_ids", "attention_mask", "token_type_ids")
    expected = model.encoder(**{name: batch[name] for name in names}, output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(expected) == 3
    for ours, theirs in zip(output.hidden_states, expected, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_16_bits_are_added_up_in_32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(400, 7, generator=generator)).to(dtype)
    targets, real = torch.randint(7, (400,), generator=generator), torch.ones(400, 7)
    for loss in (masked_lm_loss, classification_loss, lambda *each: position_loss(*each, real)):
        found = loss(logits, targets)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(logits.float(), targets), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inner_products_are_not_rounded_by_autocast(dtype):
    vectors = 100 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        found = retrieval_scores(vectors, vectors)
    assert torch.equal(found, retrieval_scores(vectors, vectors)) and found.diagonal().min() > 2**17  # beyond fp16


@RETRIEVAL
def test_a_configuration_without_return_dict_gives_the_same_as_a_tuple(model_class):
    model = build(model_class, two_towers=True)
    batch = random_batch(model.config, [5, 3])
    inputs = {**batch, "context_input_ids": batch["input_ids"], "context_attention_mask": batch["attention_mask"]}
    expected = model(**inputs)
    model.config.return_dict = False
    found = model(**inputs)
    assert isinstance(found, tuple)
    for ours, theirs in zip(found, expected.to_tuple(), strict=True):
        same(ours, theirs)
