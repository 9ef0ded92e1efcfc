"""Memory that is made and freed, against bytes counted by hand."""

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixlm.live_memory import LiveMemory, tensor_bytes


def test_counts_what_is_made_and_freed():
    before = torch.zeros(1000)
    with LiveMemory() as memory:
        first = torch.zeros(256)  # 1,024 bytes
        view = first.view(16, 16)[1:]
        before.add_(1)
        second = first + 1  # 2,048 bytes together
        del second
        third = torch.zeros(512, dtype=torch.float64)  # 4,096 bytes: 5,120 together
        assert memory.size(memory.live()) == 5120
        assert memory.size(memory.numbers([view])) == 1024
        assert memory.numbers([before]) == set()
        of_third = memory.numbers([third])
        del third, first
        assert memory.size(memory.live()) == 1024  # the view holds it
        del view
        assert memory.live() == set()
    assert memory.peak() == 5120
    assert memory.peak(without=of_third) == 2048


def test_sees_an_output_that_was_empty_before():
    with LiveMemory() as memory:
        out = torch.mm(torch.zeros(8, 8), torch.zeros(8, 8), out=torch.empty(0))
        assert memory.size(memory.numbers([out])) == 256


def test_peaks_between_moments():
    with LiveMemory() as memory:
        kept = torch.zeros(256)  # 1,024 bytes
        passing = torch.zeros(512)
        del passing
        moments = [memory.moment()]
        moments.append(memory.moment())  # nothing happens up to here
        other = torch.zeros(128)
        memory.disregard(kept)
        moments.append(memory.moment())
        third = torch.zeros(64)
        moments.append(memory.moment())
    assert memory.peaks(moments) == [1024 + 2048, 1024, 1024 + 512, 512 + 256]
    assert memory.peak() == 1024 + 2048
    del kept, other, third
    assert memory.live() == set()


def test_what_was_disregarded_is_not_freed_twice():
    with LiveMemory() as memory:
        first = torch.zeros(256)
        memory.disregard(first)
        del first
        second = torch.zeros(64)
        assert memory.peaks([memory.moment()]) == [1024]
        third = torch.zeros(64)
        assert memory.size(memory.live()) == 512
        del second, third


def test_gradients_without_content_that_meet_are_added_in_place():
    """As without the mode: two gradients of 4,000 bytes are there at once, not three."""
    with FakeTensorMode():
        weight = torch.zeros(1000, requires_grad=True)
        loss = (weight * 2).sum() + (weight * 3).sum()
        with LiveMemory() as memory:
            loss.backward()
    assert memory.peak() < 3 * 4000


def test_gradients_are_those_without_the_mode():
    """Also where one gradient goes to two inputs, and meets another at one of them."""
    gradients = []
    for mode in (nullcontext(), LiveMemory()):
        first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        doubled, tripled = first * 2, second * 3
        loss = ((doubled + tripled) * 5).sum() + doubled.sin().sum()
        with mode:
            loss.backward()
        gradients.append((first.grad, second.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and gradients[1][1].tolist() == [15.0] * 3


def test_tensors_without_content():
    with FakeTensorMode(), LiveMemory() as memory:
        first = torch.zeros(256)
        second = first @ first
        del first
        assert memory.size(memory.live()) == second.nbytes
        assert memory.peak() == 1024 + 4


def test_bytes_of_nested_tensors_count_shared_memory_once():
    first = torch.zeros(100)
    assert tensor_bytes({"both": [first, first.view(10, 10)], "none": None, "empty": torch.zeros(0)}) == 400
