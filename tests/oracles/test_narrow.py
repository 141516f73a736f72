"""Linear layers over few rows equal torch's, whatever their shapes, and leave the model as it was."""

import pytest
import torch
from torch import nn

from hone.text.narrow import MOST_ROWS, narrow_linear, narrow_linears


@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (1, 3, 5), (2, 3, 5), (MOST_ROWS + 1, 5), (0, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    made = narrow_linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(made, layer(x), rtol=1e-13, atol=1e-13)
    assert made.is_contiguous()


def test_large_plain_layers_alone_are_changed_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    monkeypatch.setattr("hone.text.narrow.LEAST_WEIGHTS", 16)
    model = nn.Sequential(nn.Linear(4, 4), Other(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 3))
    other = nn.Sequential(nn.Linear(4, 4))
    with narrow_linears(model, other):
        assert [("forward" in vars(layer)) for layer in (*model, *other)] == [True, False, False, False, True]
        with narrow_linears(model):  # what generates within a generation does not take the change away
            pass
        assert "forward" in vars(model[0])
        x = torch.randn(8, 4)
        torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert not any("forward" in vars(layer) for layer in (*model, *other))
