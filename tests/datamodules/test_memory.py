from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from datamodules.memory import Memory


def test_memory_is_used_again_once_nothing_holds_it() -> None:
    memory = Memory()
    first = memory.empty((2, 3), torch.float32)
    place = first.data_ptr()
    view = first[1].view(torch.int32)
    del first
    assert memory.empty((2, 3), torch.float32).data_ptr() != place  # the view still holds it
    del view
    assert memory.empty((3, 4), torch.int16).data_ptr() == place  # of another shape and dtype, as many bytes


def test_memory_is_held_as_long_as_a_gradient_needs_it() -> None:
    memory = Memory()
    batch, weight = memory.empty((8,), torch.float32).fill_(2), torch.ones(8, requires_grad=True)
    loss = (batch * weight).sum()
    del batch
    memory.empty((8,), torch.float32).fill_(5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, torch.full((8,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_tensors_have_shape_and_dtype_and_may_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = Memory().empty(shape, dtype)
    assert (made.shape, made.dtype) == (torch.Size(shape), dtype)
    assert made.is_contiguous()
    assert torch.equal(made.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_threads_never_share_a_batch() -> None:
    memory = Memory()

    def made(number: int) -> tuple[Tensor, int]:
        return memory.empty((1000,), torch.int32).fill_(number), number

    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            for batch, number in threads.map(made, range(50)):
                assert bool((batch == number).all())
