"""Preference data: rows of any layout, encoded once, read in a pure order. Importing this imports no torch.

The look at a data set before training is ``diffalign.data.check.check``: a name that is also a module's cannot load late.
"""

from importlib import import_module as _import

_PUBLIC = {
    "DataSpec": "spec", "Cache": "cache", "CacheReport": "encoding", "encode": "encoding", "Offline": "offline",
    "fixed_batches": "offline", "Order": "order", "detect_layout": "columns",
    "has_validation": "columns", "read_rows": "columns", "Texts": "text", "read_texts": "text", "read_clips": "music",
    "read_sounds": "sound",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffalign.data' has no attribute '{name}'")
    return getattr(_import(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
