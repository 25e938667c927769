"""Each test begins with nothing compiled, and with the generator in one state."""

import pytest
import torch
import torch._dynamo


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
