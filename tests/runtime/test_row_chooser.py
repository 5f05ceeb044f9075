"""Rows of logits, each with options of its own; the oracle is the chooser of rows that share theirs."""

from __future__ import annotations

import pytest
import torch

from tilewright.runtime.row_chooser import Choice, RowChooser
from tilewright.runtime.sampling import GenerateOptions, Sampling, own_generator, sample

GREEDY = GenerateOptions(max_length=9, eos_ids=(3, 5), pad_id=0)


def drawing(**how: float) -> GenerateOptions:
    return GenerateOptions(max_length=9, sampling=Sampling(**how))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_is_chosen_by_its_own_options(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1, 0, 3] = 9
    before = logits.float()[:, 0]
    hot, narrow = drawing(temperature=2.0), drawing(top_k=4, top_p=0.9)
    choices = [
        Choice(GREEDY),
        Choice(GREEDY, early=True),
        Choice(hot, generator=torch.Generator().manual_seed(4)),
        Choice(narrow, generator=torch.Generator().manual_seed(5)),
    ]
    allowed = before[1].clone()
    allowed[[3, 5]] = -torch.inf
    expected = [
        int(before[0].argmax()),
        int(allowed.argmax()),
        int(sample(before[2:3].clone(), Sampling(2.0), torch.Generator().manual_seed(4))),
        int(sample(before[3:4].clone(), Sampling(top_k=4, top_p=0.9), torch.Generator().manual_seed(5))),
    ]
    assert RowChooser(logits).choose(choices) == expected


def test_scores_that_are_no_numbers_are_the_trouble_of_their_row() -> None:
    logits = torch.zeros(3, 1, 10)
    logits[1] = torch.nan
    logits[2, 0, 7] = 1
    choices = [Choice(drawing(), generator=torch.Generator()) for _ in range(2)]
    first, second, third = RowChooser(logits).choose([*choices, Choice(GREEDY)])
    assert isinstance(first, int)
    assert isinstance(second, RuntimeError)
    assert third == 7


def test_a_generator_of_ones_own_draws_as_the_shared_one_would_and_the_next_differs() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(50)
    torch.manual_seed(7)
    first, second = (own_generator(torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.rand(50, generator=first), wanted)
    other = torch.rand(50, generator=second)
    assert not set(other.tolist()) & set(wanted.tolist())
    torch.manual_seed(7)
    own_generator(torch.device("cpu"))
    assert torch.equal(torch.rand(50, generator=own_generator(torch.device("cpu"))), other)
