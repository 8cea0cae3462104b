"""A local page where people rank anonymous pictures; votes in SQLite; standings; votes back out as preference data."""

from importlib import import_module as _import

_PUBLIC = {"ArenaSpec": "spec", "serve": "server", "export": "preferences", "Store": "store", "read_gallery": "gallery"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffalign.arena' has no attribute '{name}'")
    return getattr(_import(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
