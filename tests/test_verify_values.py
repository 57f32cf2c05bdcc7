"""Elements against elements: what is equal, what is not, and by how much."""

import math

import pytest
import torch

from reshard import values
from reshard.values import Kind, unequal


def flat(*numbers: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


def test_elements_of_one_kind_are_compared_as_bits() -> None:
    kinds = (Kind(torch.bfloat16), Kind(torch.bfloat16))
    nan = flat(0, math.nan, 1)
    assert unequal(nan, nan.clone(), kinds, cast=False) is None
    other = nan.clone()
    other.view(torch.int16)[1] ^= 1
    found = unequal(nan, other, kinds, cast=False)
    assert found is not None
    assert (found.place, found.count, math.isnan(found.largest)) == (1, 1, True)
    assert found.values == ("nan (0x7fc0)", "nan (0x7fc1)")
    zero = unequal(flat(0.0), flat(-0.0), kinds, cast=False)
    assert zero is not None
    assert (zero.values, zero.largest) == (("0.0", "-0.0"), 0)


def test_a_nan_that_was_converted_is_a_nan() -> None:
    wide, half = flat(math.nan, 3, dtype=torch.float32), flat(math.nan, 3)
    half.view(torch.int16)[0] = 0x7FC1
    kinds = (Kind(torch.float32), Kind(torch.bfloat16))
    for cast in (True, False):
        assert unequal(wide, half, kinds, cast=cast) is None
        found = unequal(wide, flat(1, math.nan), kinds, cast=cast)
        assert found is not None
        assert (found.count, found.values) == (2, ("nan", "1.0"))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool]
)
def test_counts_and_differences_are_those_of_a_whole_comparison(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "STEP", 32)
    generator = torch.Generator().manual_seed(5)
    for size in (1, 31, 32, 33, 200):
        one = (torch.randn(size, generator=generator) * 9).to(dtype)
        chosen = (torch.rand(size, generator=generator) < 0.2) & (torch.arange(size) >= size // 2)
        other = torch.where(chosen, one * 0 == 1, one).to(dtype)
        found = unequal(one, other, (Kind(dtype), Kind(dtype)), cast=False)
        places = [n for n in range(size) if one[n].item() != other[n].item()]
        if not places:
            assert found is None
            continue
        assert found is not None
        away = max(abs(one[n].item() - other[n].item()) for n in places)
        assert (found.place, found.count, found.largest) == (places[0], len(places), away)
        assert found.values == (repr(one[places[0]].item()), repr(other[places[0]].item()))
