"""Before any test imports transformers or diffusers: a torchvision that does not fit the CPU's torch would break them."""

from diffalign import _compat  # noqa: F401
