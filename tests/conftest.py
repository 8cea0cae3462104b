"""Before any test imports transformers or diffusers: a torchvision that does not fit the CPU's torch would break them."""

import gc

from diffalign import _compat  # noqa: F401


def pytest_collection_finish():
    """A training run ends with a collection of garbage; it need not look through all that the test modules have imported."""
    gc.freeze()
