"""Tests run in float64 unless they say otherwise, and from a fixed state of the generator."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Threads cost more than they bring on tensors of this size, and far more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


# The same cases in every run of the suite; in nightly ones, other and more cases of those tests
# that leave their number to the profile (test_properties.py): KFOC_CASES for each of them.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=200)
settings.register_profile(
    "nightly",
    max_examples=int(os.environ.get("KFOC_CASES", "2000")),
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("KFOC_PROFILE", "suite"))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names that say what is tried: docs/layers.md is made of them."""
    if isinstance(val, dict):
        return " ".join(f"{key}={_named(value)}" for key, value in val.items()) or "-"
    if isinstance(val, bool):
        return argname if val else f"no {argname}"
    if isinstance(val, tuple) and all(isinstance(item, int) for item in val):
        return "x".join(map(str, val)) or "scalar"
    return None


def _named(value: object) -> str:
    """Without an address, which every process has another one of."""
    return getattr(value, "__name__", str(value).replace(" ", ""))
