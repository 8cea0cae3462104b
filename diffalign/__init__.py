"""diffalign: preference alignment for diffusion models. Importing it is quick and imports no torch.

    recipe = diffalign.load_recipe("configs/quickstart.yaml", ["seed=1"])
    diffalign.run.train(recipe, printer=print)
    report = diffalign.run.evaluate(recipe)

``run`` holds what the command line does: train, encode, check, evaluate, grid. ``load_reward("scenes")`` gives what it
scores with.
"""

from importlib import import_module as _import

__version__ = "0.1.0"

_PUBLIC = {"Recipe": "config", "load_recipe": "config", "load_reward": "config", "UserError": "errors"}
__all__ = [*_PUBLIC, "run", "__version__"]


def __getattr__(name: str):
    if name == "run":
        return _import(".run", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffalign' has no attribute '{name}'")
    return getattr(_import(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
