"""The bundled questions as a task of MTEB, on an exported model."""

import mteb_sample
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import mixlm
from mixlm.data.passages import Passage
from mixlm.data.squad import read_squad
from mixlm.encoder import Encoding, MixLMEncoder
from mixlm.exporting.sentences import export_sentence_transformers
from mixlm.tokenization import train_tokenizer


def test_scores_are_those_of_the_vectors(tmp_path):
    examples = read_squad(mteb_sample.SAMPLE).examples
    contexts = list(dict.fromkeys((example.title, example.context) for example in examples))
    tokenizer = train_tokenizer([context for _, context in contexts], 2000, show_progress=False)
    torch.manual_seed(0)
    config = mixlm.MixLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, n_experts=2, num_heads=2, kernel_size=5,
        ff_dim=64, max_position_embeddings=64, pooler="mean", normalize_embeddings=True,
    )  # fmt: skip
    mixlm.MixLMForRetrieval(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    Encoding(32, 64).save(tmp_path / "source")
    export_sentence_transformers(tmp_path / "source", tmp_path / "exported")
    model = SentenceTransformer(str(tmp_path / "exported"), trust_remote_code=True, device="cpu")
    found = mteb_sample.evaluate(model)

    encoder = MixLMEncoder.from_pretrained(tmp_path / "source", device="cpu")
    joined = [Passage(str(number), "", f"{title} {text}") for number, (title, text) in enumerate(contexts)]
    queries = encoder.encode_queries([example.question for example in examples])
    own = np.array([contexts.index((example.title, example.context)) for example in examples])
    scores = queries @ encoder.encode_passages(joined).T
    ranks = (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1) + 1
    inside = ranks <= 10
    assert 0.1 < inside.mean() < 1
    assert found["hit_rate_at_1"] == pytest.approx((ranks == 1).mean(), abs=1e-4)
    assert found["recall_at_10"] == pytest.approx(inside.mean(), abs=1e-4)
    assert found["mrr_at_10"] == pytest.approx(np.where(inside, 1 / ranks, 0).mean(), abs=1e-4)
    assert found["ndcg_at_10"] == pytest.approx(np.where(inside, 1 / np.log2(ranks + 1), 0).mean(), abs=1e-4)
