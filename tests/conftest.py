import logging
import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_reproducible():
    torch.manual_seed(0)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        yield
