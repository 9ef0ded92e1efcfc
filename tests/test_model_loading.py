"""What loading refuses and leaves as it was, and by what weights are known again."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.utils import logging

from mixlm.errors import UserError
from mixlm.loading import hash_of_weights, loading, require_room


@pytest.fixture
def verbosity():
    """That of transformers, which is `INFO` in the test."""
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    yield logging.get_verbosity
    logging.set_verbosity(before)


@pytest.mark.parametrize("error", [None, OSError("absent"), KeyboardInterrupt()])
def test_transformers_is_quiet_while_something_is_loaded_and_not_afterwards(verbosity, error):
    with suppress(UserError, KeyboardInterrupt), loading("some/model"):
        assert verbosity() == logging.ERROR
        if error is not None:
            raise error
    assert verbosity() == logging.INFO


def test_texts_may_be_as_long_as_the_model_takes():
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=32))
    require_room(model, "some/model", max_seq_length=32)
    with pytest.raises(UserError, match="--max_passage_length=33: some/model takes at most 32 tokens"):
        require_room(model, "some/model", max_query_length=32, max_passage_length=33)


def test_weights_are_known_by_their_names_and_values():
    def hash_of(first, second):
        model = nn.ParameterDict({"first": torch.full((2, 3), first), "second": torch.full((2, 3), second)})
        return hash_of_weights(model)

    assert hash_of(1.0, 2.0) == hash_of(1.0, 2.0)
    assert len({hash_of(1.0, 2.0), hash_of(2.0, 1.0), hash_of(1.0, 1.0), hash_of(1.0, 2.5)}) == 4
    one, other = nn.ParameterDict({"first": torch.ones(2)}), nn.ParameterDict({"second": torch.ones(2)})
    assert hash_of_weights(one) != hash_of_weights(other)
