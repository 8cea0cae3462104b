"""diffalign: preference alignment for diffusion models. Importing it is quick and imports no torch."""

from importlib import import_module as _import

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "config", "load_recipe": "config",
    "train": "run", "encode": "run", "evaluate": "run", "grid": "run", "check": "run",
    "UserError": "errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffalign' has no attribute '{name}'")
    return getattr(_import(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
