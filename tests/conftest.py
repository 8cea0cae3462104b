"""Before any test imports transformers or diffusers: a torchvision that does not fit the CPU's torch would break them."""

import gc

from diffalign import _compat  # noqa: F401

LONG = ("e2e", "train", "models")  # folders with the longest files


def pytest_collection_modifyitems(items):
    """Long files first, so that at the end no core waits for one."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_collection_finish():
    """A training run ends with a collection of garbage; it need not look through all that the test modules have imported."""
    gc.freeze()
