"""A tiny retriever and what it encodes."""

import pytest
import torch

import mixlm
from mixlm.data.passages import Passage
from mixlm.encoder import Encoding
from mixlm.tokenization import train_tokenizer

PASSAGES = [
    Passage("jeju", "제주도", "한국에서 가장 큰 섬이다."),
    Passage("sejong", "세종", "1443년에 한글을 만들었다."),
    Passage("school", "", "학교에 갔다."),
    Passage("sea", "", "바다와 섬과 산"),
    Passage("again", "", "바다와 섬과 산"),
    Passage("dogs", "", "dogs run"),
    Passage("seoul", "서울", "한국에서 가장 큰 도시이다."),
]


def save_retriever(folder, seed=0):
    """A retriever with random weights."""
    tokenizer = train_tokenizer([f"{title} {text}" for _, title, text in PASSAGES] * 3, 200, show_progress=False)
    config = mixlm.MixLMConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, n_experts=2, num_heads=2, kernel_size=5,
        ff_dim=32, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    mixlm.MixLMForRetrieval(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Encoding(max_query_length=16, max_passage_length=32).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def retriever(tmp_path_factory):
    return save_retriever(tmp_path_factory.mktemp("retriever"))


@pytest.fixture(scope="session")
def other_retriever(tmp_path_factory):
    return save_retriever(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def passages():
    return PASSAGES
