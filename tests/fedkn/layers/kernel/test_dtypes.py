from __future__ import annotations

import pytest
import torch

from fedkn.layers.kernel.dtypes import cast, wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_in_float32_at_least(dtype) -> None:
    assert wide(dtype) == torch.promote_types(dtype, torch.float32)


def test_a_cast_converts_where_it_must_and_only_there() -> None:
    x = torch.randn(3)
    assert cast(x, torch.float32) is x
    assert torch.equal(cast(x, torch.bfloat16), x.to(torch.bfloat16))
