"""YAML and overrides -> frozen dataclasses. The only file that knows every concrete class, through literal tables.

A recipe is a tree of sections; a slot (objective, link, weighting, ...) is ``kind`` plus that class's fields. The component
is its own configuration: there is no second definition of its fields. pydantic validates the leaves; unknown keys and kinds
are refused with the full path and the nearest name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import runpy
import sys
import types
import typing
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from . import likelihood, objectives, process, rewards
from .arena.spec import ArenaSpec
from .building.editor import EDITORS, Editor
from .building.feedback import CRITICS, INSTRUCTORS, Critic, Instructor
from .building.filters import EMBEDDERS, FILTERS, QUALITIES, Embedder, Quality
from .building.rich import RichSpec
from .building.select import SELECTS, Select
from .building.spec import BuildSpec, ScoreSpec
from .building.types import Filter
from .building.utility import UTILITIES, Utility
from .data.sources import Online, SemiPolicy, Stored
from .data.spec import DataSpec
from .data.stepwise import JUDGES, THRESHOLDS, StepJudge, Stepwise, Threshold
from .errors import ConfigError, first_line
from .evaluate.monitor import MonitorSpec
from .evaluate.spec import CheckSpec, EvaluateSpec
from .language.propose import PROPOSERS, Proposer
from .language.spec import RewriterSpec
from .models.references import REFERENCES, Frozen, Past, Reference
from .models.spec import ModelSpec
from .reward_training.spec import RewardRecipe
from .rewards.heads import Head
from .rewards.learned import HEADS
from .train.spec import TrainSpec

SOURCES = {"stored": Stored, "semi_policy": SemiPolicy, "online": Online, "stepwise": Stepwise}
SourceSpec = Stored | SemiPolicy | Online | Stepwise


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is told. Written beside every checkpoint as config.resolved.yaml."""

    output_dir: str
    model: ModelSpec
    data: DataSpec
    objective: objectives.Objective
    seed: int = 0
    likelihood: likelihood.Likelihood = likelihood.DenoisingELBO()
    reference: Reference = Frozen()
    source: SourceSpec = Stored()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec | None = None
    check: CheckSpec = CheckSpec()
    monitor: MonitorSpec | None = None

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a folder for the run's files")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A recipe without training: models are compared as they are. The first of ``evaluate.models`` is the one that the verdict
    is about, ``model`` is the base. cpu: as in ``train``.
    """

    output_dir: str
    model: ModelSpec
    evaluate: EvaluateSpec
    seed: int = 0
    cpu: bool = False

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a folder for the report")
        if not self.evaluate.models:
            raise ValueError("evaluate.models is empty; without training (data, objective), say what to compare the base with")


@dataclass(frozen=True, kw_only=True)
class PromptsTask:
    """What to do with a recipe of a prompt rewriter."""

    ACTIONS: typing.ClassVar = ("evolve", "train", "rewrite")
    action: str
    spec: RewriterSpec


_RECIPES = {"train": Recipe, "evaluate": Evaluation, "build": BuildSpec, "rich": RichSpec, "train-reward": RewardRecipe,
            "prompts": RewriterSpec}

# every slot with alternatives: annotation -> (table of kinds, default kind, entry point group)
_SLOTS = {
    objectives.Objective: (objectives.OBJECTIVES, None, "diffalign.objectives"),
    objectives.Link: (objectives.LINKS, "logistic", "diffalign.links"),
    objectives.Pairs: (objectives.PAIRS, "best_worst", None),
    objectives.Labels: (objectives.LABELS, "hard", "diffalign.labels"),
    likelihood.Likelihood: (likelihood.ESTIMATORS, "denoising", None),
    likelihood.Weighting: (likelihood.WEIGHTINGS, "simple", None),
    process.NoisePlan: (process.NOISES, "shared", None),
    process.Times: (process.TIMES, "uniform", None),
    process.Sequence: (process.SEQUENCES, "random", None),
    Reference: (REFERENCES, "frozen", None),
    rewards.Reward: (rewards.REWARDS, None, "diffalign.rewards"),
    Head: (HEADS, "bradley_terry", None),
    SourceSpec: (SOURCES, "stored", None),
    Utility: (UTILITIES, None, None),
    Select: (SELECTS, "groups", None),
    Filter: (FILTERS, None, None),
    Embedder: (EMBEDDERS, "ngrams", None),
    Quality: (QUALITIES, "rules", None),
    Critic: (CRITICS, None, None),
    Instructor: (INSTRUCTORS, None, None),
    Editor: (EDITORS, None, None),
    StepJudge: (JUDGES, None, None),
    Threshold: (THRESHOLDS, "constant", None),
    Proposer: (PROPOSERS, "rewriter", None),
}


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and ``key=value`` overrides. Raises ConfigError naming the option's path.

    ``extends: other.yaml``, relative to the file, starts from that recipe: sections are merged option by option, except that a
    slot whose ``kind`` is given starts afresh.
    """
    return build_recipe(_overridden(read_tree(Path(path)), overrides))


def load_build(path: str | Path, overrides: typing.Sequence[str] = ()) -> BuildSpec:
    """A recipe of ``diffalign build``, read as ``load_recipe`` reads one. Raises ConfigError naming the option's path."""
    return _build(BuildSpec, _overridden(read_tree(Path(path)), overrides), "")


def load_rich(path: str | Path, overrides: typing.Sequence[str] = ()) -> RichSpec:
    """A recipe of rich feedback, read as ``load_recipe`` reads one. Raises ConfigError naming the option's path."""
    return _build(RichSpec, _overridden(read_tree(Path(path)), overrides), "")


def load_reward_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> RewardRecipe:
    """A recipe of ``diffalign train-reward``, read as ``load_recipe`` reads one. Raises ConfigError."""
    return _build(RewardRecipe, _overridden(read_tree(Path(path)), overrides), "")


def load_prompts(action: str, path: str | Path, overrides: typing.Sequence[str] = ()) -> PromptsTask:
    """What ``diffalign prompts`` is told: an action and a recipe, read as ``load_recipe`` reads one. Raises ConfigError."""
    if action not in PromptsTask.ACTIONS:
        raise ConfigError(f"prompts: no action called {_show(action)}.{_did_you_mean(action, PromptsTask.ACTIONS)} "
                          f"Known: {', '.join(PromptsTask.ACTIONS)}.")
    return PromptsTask(action=action, spec=_build(RewriterSpec, _overridden(read_tree(Path(path)), overrides), ""))


def load_score(rewards: str, data: str, overrides: typing.Sequence[str] = ()) -> ScoreSpec:
    """What ``diffalign score`` is told. rewards: kinds separated by commas, a YAML mapping of names to rewards, or a .yaml
    file that holds one. data: what to score. Raises ConfigError.
    """
    return _build(ScoreSpec, _overridden({"rewards": _named_rewards(rewards), "data": data}, overrides), "")


def load_arena(gallery: str, overrides: typing.Sequence[str] = ()) -> ArenaSpec:
    """What ``diffalign arena`` is told. Raises ConfigError."""
    return _build(ArenaSpec, _overridden({"gallery": gallery}, overrides), "")


def _overridden(tree: dict, overrides: typing.Sequence[str]) -> dict:
    """The last of several for one option holds: programs add theirs to a list."""
    for override in overrides:
        apply_override(tree, override)
    return tree


def check_given_once(overrides: typing.Sequence[str], positionals: typing.Sequence[str] = ()) -> None:
    """Of the command line, where the last would win without a word over what an unquoted {0..9} made several options of.
    positionals: options that it holds without their key. Raises ConfigError.
    """
    seen = list(positionals)
    for override in overrides:
        path = override.partition("=")[0].strip()
        lost = next((before for before in seen if before == path or before.startswith(f"{path}.")), None)
        if lost == path:
            raise ConfigError(f"{path}: is given twice, the second time as '{override[:200]}'; keep one, and put quotes "
                              "around what the shell makes several words of, such as 'data.path=pairs-{000..099}.tar'")
        if lost is not None:
            raise ConfigError(f"{lost}: is given before '{override[:200]}', which replaces it; give {path} first")
        seen.append(path)


def _named_rewards(text: str) -> dict:
    if text.endswith((".yaml", ".yml")):
        return read_tree(Path(text))
    if ":" not in text:
        kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice:
            raise ConfigError(f"rewards: '{twice}' is given twice")
        return {kind: kind for kind in kinds}
    tree = parse_yaml(text, "rewards")
    if not isinstance(tree, dict):
        raise ConfigError(f"rewards: expected kinds separated by commas, or {{name: {{kind: ...}}}}, got {_show(text)}")
    return {str(tree["kind"]): tree} if "kind" in tree else tree


def load_evaluation(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe | Evaluation:
    """As ``load_recipe``; one that says nothing of training is an ``Evaluation``."""
    tree = _overridden(read_tree(Path(path)), overrides)
    trains = tree.keys() & ({f.name for f in dataclasses.fields(Recipe)} - {f.name for f in dataclasses.fields(Evaluation)})
    return build_recipe(tree) if trains or "evaluate" not in tree else _build(Evaluation, tree, "")


def build_recipe(tree: dict) -> Recipe:
    """A recipe from a plain tree."""
    recipe = _build(Recipe, tree, "")
    _cross_check(recipe)
    return recipe


def load_reward(spec: str | dict) -> rewards.Reward:
    """A reward by its kind, ``"scenes"``, or by kind and options, ``{"kind": "compressibility", "quality": 80}``; its weights
    are loaded when it is first called. Raises ConfigError for an unknown kind or option.
    """
    return _slot(rewards.Reward, spec, "reward")


def load_utility(spec: str | dict) -> Utility:
    """A utility by its kind, or by kind and options. Raises ConfigError for an unknown kind or option."""
    return _slot(Utility, spec, "utility")


def rewards_from(path: str | Path) -> list[str]:
    """Make the rewards of a Python file known under their names; returns those. Runs the file: for files that the user names.

    A reward there is a frozen dataclass with ``name``, ``differentiable`` and ``__call__``. Raises ConfigError for a file that
    cannot be run or holds none, and for a name that is taken.
    """
    if not Path(path).exists():
        raise ConfigError(f"{path}: no such file (given to --rewards-from)")
    try:
        found = runpy.run_path(str(path), run_name=Path(path).stem)
    except (Exception, SystemExit) as error:  # a stranger's file may fail in any way
        raise ConfigError(f"{path}: cannot be run for its rewards ({type(error).__name__}: {first_line(error)})") from None
    module = types.ModuleType(Path(path).stem)  # annotations are looked up in the module a class names as its own
    module.__dict__.update(found)
    sys.modules.setdefault(module.__name__, module)
    own = {cls.name: cls for cls in found.values() if isinstance(cls, type) and cls.__module__ == module.__name__
           and isinstance(getattr(cls, "name", None), str) and _unfit(cls, _NEEDED["diffalign.rewards"]) is None}
    if not own:
        raise ConfigError(f"{path}: holds no reward; one is a frozen dataclass with name, differentiable and __call__")
    taken = [name for name in own if name in rewards.REWARDS]
    if taken:
        raise ConfigError(f"{path}: there is a reward called '{taken[0]}' already; choose another name")
    rewards.REWARDS.update(own)
    return sorted(own)


def as_tree(value) -> object:
    """The plain tree that builds ``value`` again: dataclasses become mappings, with ``kind`` where the slot needs one."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: as_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = _kind_of(type(value))
        return fields if kind is None else {"kind": kind, **fields}
    if isinstance(value, (tuple, list)):
        return [as_tree(item) for item in value]
    return {name: as_tree(item) for name, item in value.items()} if isinstance(value, dict) else value


def dump(recipe: Recipe | Evaluation | BuildSpec) -> str:
    return yaml.safe_dump(as_tree(recipe), sort_keys=False, allow_unicode=True)


# --- reading --------------------------------------------------------------------------------------------------------

class _Loader(yaml.SafeLoader):
    """Plain data only: no aliases, no merge keys, no duplicate keys; 1e-5 is a number, on/off and 12:30 are text."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"line {self.peek_event().start_mark.line + 1}: YAML aliases are not accepted")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    result = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(f"line {line}: option names are text, got {key!r}")
        if key in result:
            raise ConfigError(f"line {line}: the option '{key}' is given twice")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":")[-1] in ("null",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
for _tag, _pattern, _first in (
        ("bool", r"^(?:true|True|false|False)$", "tTfF"),
        ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
        ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$", "-+0123456789.")):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))

_MAX_BYTES = 1_000_000


def parse_yaml(text: str, where: str) -> object:
    """YAML text -> plain data. Raises ConfigError starting with ``where``."""
    if text.count("[") + text.count("{") > 1000:
        raise ConfigError(f"{where}: nested too deeply for a recipe")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: builds plain data only
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where}: {line}{error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML ({first_line(error)})") from None


def read_yaml(path: Path) -> dict:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than 1 MB; is this a recipe?")
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe.{_near(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe ({error.__class__.__name__}: {error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of options, got {type(tree).__name__}")
    return tree


def read_tree(path: Path, below: tuple[Path, ...] = ()) -> dict:
    """The file's tree on top of the one it extends."""
    tree = read_yaml(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: expected the name of a recipe, got {_show(base)}")
    chain = (*below, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"{path}: extends: {base} extends this recipe itself")
    return _merged(read_tree(path.parent / base, chain), tree)


def _merged(base: dict, over: dict) -> dict:
    """``over`` on ``base``; a mapping with a kind of its own replaces what was there."""
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        both = isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        result[name] = _merged(old, value) if both else value
    return result


def _near(path: Path) -> str:
    names = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return _did_you_mean(str(path), names)


def apply_override(tree: dict, override: str) -> None:
    """Set ``a.b.c=value`` in the tree, in place; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise ConfigError(f"'{override}': an override is key=value, such as train.learning_rate=1e-5")
    *parents, last = path.strip().split(".")
    node = tree
    for depth, name in enumerate(parents):
        if node.get(name) is None:
            node[name] = {}
        if isinstance(node[name], str):  # 'link: hinge', to which an option is added
            node[name] = {"kind": node[name]}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(parents[:depth + 1])}: is a value, so '{path}' cannot be set")
    node[last] = parse_yaml(text, path)


# --- building -------------------------------------------------------------------------------------------------------

def _build(cls: type, tree: object, path: str, lead: tuple[str, ...] = ()):
    """An instance of the dataclass ``cls`` from a mapping; every field by its annotation."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'recipe'}: expected options of {cls.__name__}, got {_show(tree)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            suggestion = ("" if path else _other_command(tree, cls)) or _did_you_mean(key, [*lead, *fields])
            raise ConfigError(f"{_join(path, key)}: unknown option for {cls.__name__}.{suggestion}")
    missing = [name for name, f in fields.items() if name not in tree and _required(f)]
    if missing:
        raise ConfigError(f"{_join(path, missing[0])}: is missing")
    values = {name: _value(hints[name], _on_default(field, tree[name]), _join(path, name))
              for name, field in fields.items() if name in tree}
    try:
        return cls(**values)
    except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:  # the last ones in a stranger's class
        raise ConfigError(_place(path, str(error) or type(error).__name__, fields)) from None


def _other_command(tree: dict, cls: type) -> str:
    """Whose recipe this is, where all of it fits another command's."""
    fitting = [command for command, spec in _RECIPES.items()
               if spec is not cls and tree.keys() <= {field.name for field in dataclasses.fields(spec)}]
    return f" This is a recipe of `diffalign {fitting[0]}`." if fitting else ""


def _on_default(field: dataclasses.Field, value: object) -> object:
    """A section that is given in part is completed by the field's own default, which may be another one than its class's."""
    if isinstance(value, dict) and "kind" not in value and dataclasses.is_dataclass(field.default):
        return {**as_tree(field.default), **value}
    return value


def _value(annotation, value: object, path: str):
    """One field: a slot, a section, an optional section, or a leaf."""
    if annotation in _SLOTS:
        return _slot(annotation, value, path)
    inner = _optional(annotation)
    if inner is not None and value is None:
        return None
    if inner in _SLOTS:
        return _slot(inner, value, path)
    for candidate in (inner, annotation):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return _build(candidate, _without_kind(value, candidate), path)
        if _part(candidate) is not None:
            return _several(candidate, value, path)
    return _leaf(annotation, value, path)


def _part(annotation):
    """``X`` of ``tuple[X, ...]`` or ``dict[str, X]`` where X is a slot or a section; else None."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        part = arguments[0]
    elif typing.get_origin(annotation) is dict:
        part = arguments[1]
    else:
        return None
    return part if part in _SLOTS or isinstance(part, type) and dataclasses.is_dataclass(part) else None


def _several(annotation, value: object, path: str):
    """A list of slots or sections, or a mapping of names to them."""
    part = _part(annotation)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {_show(value)}")
        return tuple(_value(part, item, f"{path}.{number}") for number, item in enumerate(value))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected names with their options, such as {{a: ...}}, got {_show(value)}")
    return {name: _value(part, item, _join(path, name)) for name, item in value.items()}


def _slot(annotation, value: object, path: str):
    table, default, group = _SLOTS[annotation]
    kinds = _kinds(table, group)
    if isinstance(value, str):  # 'link: hinge' says the same as 'link: {kind: hinge}'
        value = {"kind": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a kind ({', '.join(kinds)}) with its options, got {_show(value)}")
    kind = value.get("kind", default)
    if kind is None:
        raise ConfigError(f"{path}.kind: is missing; one of {', '.join(kinds)}")
    cls = table.get(kind) if isinstance(kind, str) else None
    if cls is None and group is not None and isinstance(kind, str):
        cls = _plugin(group, kind, path)
    if cls is None:
        noun = getattr(annotation, "__name__", path.rsplit(".", 1)[-1]).lower()
        raise ConfigError(f"{path}.kind: no {noun} called {_show(kind)}."
                          f"{_did_you_mean(str(kind), kinds)} Known: {', '.join(kinds)}.")
    return _build(cls, {k: v for k, v in value.items() if k != "kind"}, path, lead=("kind",))


_NEEDED = {"diffalign.objectives": ("reference_free", "min_k"),  # what the loop asks an objective for
           "diffalign.rewards": ("name", "differentiable")}


def _kinds(table: dict[str, type], group: str | None) -> list[str]:
    """All names a slot knows: ours, then those of installed packages. Ours win over theirs."""
    theirs = {point.name for point in entry_points(group=group)} if group else set()
    return [*table, *sorted(theirs - set(table))]


def _plugin(group: str, kind: str, path: str) -> type | None:
    """A third party's component, by entry point name; never by a dotted path in a file. None where nobody offers it."""
    found = {point.value: point for point in entry_points(group=group) if point.name == kind}
    if not found:
        return None
    where = f"{path}.kind: the plug-in '{kind}' ({', '.join(sorted(found))}, entry point of {group})"
    if len(found) > 1:
        raise ConfigError(f"{where} is offered by several packages; keep one of them installed")
    try:
        cls = found.popitem()[1].load()
    except (Exception, SystemExit) as error:  # a stranger's module may fail in any way
        raise ConfigError(f"{where} cannot be loaded: {first_line(error)}") from None
    problem = _unfit(cls, _NEEDED.get(group, ()))
    if problem:
        raise ConfigError(f"{where} {problem}")
    return cls


def _unfit(cls: object, needed: tuple[str, ...]) -> str | None:
    """What keeps a third party's class from being a component, or None: building, writing and running rely on it."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):
        return "is not a frozen dataclass"
    if not any("__call__" in parent.__dict__ for parent in cls.__mro__):  # hasattr would find the metaclass's
        return "has no __call__"
    fields = {f.name for f in dataclasses.fields(cls)}
    lacks = [name for name in needed if name not in fields and not hasattr(cls, name)]
    if lacks:
        return f"lacks {' and '.join(lacks)}"
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:  # an annotation is any expression
        return f"has an option whose type cannot be read: {first_line(error)}"
    odd = [name for name in sorted(fields) if not _is_option(hints[name])]
    return f"has an option that a recipe cannot hold: {odd[0]} is a {_words(hints[odd[0]])}" if odd else None


def _is_option(annotation) -> bool:
    """Whether ``_value`` knows what to do with a field of this type."""
    inner = _optional(annotation)
    if any(known in _SLOTS or isinstance(known, type) and dataclasses.is_dataclass(known) or _part(known) is not None
           for known in (annotation, inner)):
        return True
    try:
        TypeAdapter(annotation)
    except Exception:  # pydantic knows no schema for it
        return False
    return True


def _leaf(annotation, value: object, path: str):
    if isinstance(value, str) and typing.get_origin(_optional(annotation) or annotation) is tuple:
        raise ConfigError(f"{path}: expected a list, such as {path.rpartition('.')[2]}=[{value[:40]}], got {_show(value)}")
    try:
        result = TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        problems = [problem["msg"][0].lower() + problem["msg"][1:] for problem in error.errors()]
        raise ConfigError(f"{path}: {', '.join(dict.fromkeys(problems))}, got {_show(value)}") from None
    _check_read(value, result, path)
    if isinstance(result, str) and result.startswith("~/"):  # no shell does it behind data.path=, nor in a file
        return str(Path(result).expanduser())
    return result


def _check_read(value: object, result: object, path: str) -> None:
    """Refuses what pydantic lets pass, in lists and mappings too: switches and texts for numbers, numbers without an end."""
    if isinstance(result, (tuple, dict)):
        for name, item in result.items() if isinstance(result, dict) else enumerate(result):
            _check_read(value[name], item, f"{path}.{name}")
        return
    if isinstance(value, bool) != isinstance(result, bool):
        raise ConfigError(f"{path}: expected {type(result).__name__}, got {_show(value)}")
    if isinstance(value, str) and isinstance(result, (int, float)):
        raise ConfigError(f"{path}: expected {type(result).__name__}, got the text {_show(value)}")
    if isinstance(result, str) and not _is_text(result):
        raise ConfigError(f"{path}: holds a zero or bytes that are not UTF-8 text, got {ascii(value)[:60]}")
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(f"{path}: must be a finite number, got {_show(value)}")


def _is_text(value: str) -> bool:
    """False for what no file system call or UTF-8 file takes: a zero, or a half of a surrogate pair."""
    return "\0" not in value and value == value.encode("utf-8", "ignore").decode("utf-8")


def _optional(annotation):
    """``X`` of ``X | None``, where X may be a union itself; else None."""
    parts = typing.get_args(annotation)
    if (isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union) and type(None) in parts:
        return typing.Union[tuple(part for part in parts if part is not type(None))]  # noqa: UP007  (built at run time)
    return None


def _without_kind(value: object, cls: type) -> object:
    """Sections of a single kind accept that kind's name, so that a written tree reads back."""
    kind = _kind_of(cls)
    return {k: v for k, v in value.items() if k != "kind" or v != kind} if isinstance(value, dict) else value


def _kind_of(cls: type) -> str | None:
    tables = [table for table, _, _ in _SLOTS.values()]
    named = [kind for table in tables for kind, known in table.items() if known is cls]
    if named:
        return named[0]
    if cls.__module__.partition(".")[0] == __package__:  # a section of ours; entry points are slow to read
        return None
    slots = [(table, group) for table, _, group in _SLOTS.values() if group]
    return next((point.name for table, group in slots for point in entry_points(group=group)
                 if point.name not in table and _offers(point, cls)), None)


def _offers(point: EntryPoint, cls: type) -> bool:
    """Whether the entry point is this class; its path may be another one than where the class was written."""
    try:
        return point.load() is cls
    except (Exception, SystemExit):  # another package's trouble
        return False


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _place(path: str, message: str, fields) -> str:
    """'beta must be above 0' -> 'objective.beta: must be above 0'."""
    name, _, rest = message.partition(" ")
    if name in fields:
        return f"{_join(path, name)}: {rest}"
    return f"{path}: {message}" if path else message


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _words(annotation) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _did_you_mean(word: str, known: typing.Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [name for name in known if word in name.split("_")]
    return f' Did you mean "{near[0]}"?' if near else ""


# --- options that don't fit together --------------------------------------------------------------------------------

UNSCORED = ("pickapic", "chosen_rejected", "unpaired")  # layouts that say who is better, not by how much


def _cross_check(recipe: Recipe) -> None:
    check_layout(recipe, recipe.data.layout)
    _check_paths(recipe)
    _check_latent_reward(recipe)
    _check_text(recipe)
    objective, title, reference = recipe.objective, objectives.title_of(recipe.objective), recipe.reference
    weighting = getattr(recipe.likelihood, "weighting", likelihood.Simple())
    if not objectives.reads_weighting(objective) and not isinstance(weighting, likelihood.Simple):
        raise ConfigError(f"likelihood.weighting: {title} reads plain errors, which no weighting enters; leave it at simple")
    if reference.moves and objective.reference_free and getattr(recipe.source, "weights", None) != "reference":
        raise ConfigError(f"reference.kind: {title} compares with no reference, so none can move; leave it at frozen")
    if isinstance(reference, Past) and recipe.model.lora is None:
        raise ConfigError(f"reference.kind: past keeps {reference.keep} checkpoints in memory, which only a LoRA makes small; "
                          "set model.lora, or use reference.kind=moving")
    if isinstance(recipe.source, SemiPolicy) and recipe.source.weights == "reference" and len(reference.names) > 1:
        raise ConfigError("reference.origin_share: samples come from one reference, but the likelihood would be measured "
                          "against two; set it to 0, or source.weights=origin")
    if recipe.source.reads_prompts_only and recipe.data.random_flip:
        raise ConfigError("data.random_flip: with this source.kind no stored picture is read, so there is none to mirror; "
                          "set it to false")
    if recipe.source.reads_prompts_only and recipe.data.caption_dropout:
        raise ConfigError("data.caption_dropout: a sample drawn without its prompt would be scored against it; set it to 0 "
                          "with this source.kind")


def _check_latent_reward(recipe: Recipe) -> None:
    """Its policy is a reward: it has no reference, draws no pictures and is trained whole."""
    if not isinstance(recipe.likelihood, likelihood.LatentScores):
        return
    if not isinstance(recipe.objective, objectives.Pairwise) or not recipe.objective.reference_free:
        raise ConfigError("objective: likelihood.kind=latent_reward learns scores from pairs, which have no reference; use "
                          "objective={kind: dpo, beta: 1, reference_free: true}")
    if recipe.model.lora is not None:
        raise ConfigError("model.lora: likelihood.kind=latent_reward trains all weights of the reward; set it to null")
    if not isinstance(recipe.source, Stored):
        raise ConfigError("source.kind: likelihood.kind=latent_reward learns from stored pairs; leave it at stored")
    if recipe.evaluate is not None:
        raise ConfigError("evaluate: a latent reward draws no pictures; set it to null (train.json has its held-out accuracy)")


# options that say something of pictures or of diffusers pipelines, with the values that say nothing
OF_PICTURES = {"data": ("image_root", "resolution", "aspect_ratio_buckets", "random_flip", "caption_dropout", "cache_dir"),
               "model": ("variant", "pretrained_vae_model_name_or_path", "fuse_lora", "distilled"),
               "train": ("enable_xformers_memory_efficient_attention",)}
_OF_TEXT = ("chat_template", "max_tokens")
_OF_PIPELINES = ("num_inference_steps", "guidance_scale", "negative_prompt", "scheduler", "timestep_spacing", "height",
                 "width", "strengths")
_TOKENS = {likelihood.MaskedELBO: ("masked", "text"), likelihood.CodeLikelihood: ("codes", "codec tokens")}


def _check_text(recipe: Recipe) -> None:
    """A language model reads stored text or codec tokens; nothing of it is a picture."""
    kind, subject = _TOKENS.get(type(recipe.likelihood), (None, ""))
    if kind != "masked":
        for name in _OF_TEXT:
            if getattr(recipe.data, name) != getattr(DataSpec, name):
                raise ConfigError(f"data.{name}: is of text, which likelihood.kind=masked reads; leave it out")
    if kind is None:
        return
    for section, names in OF_PICTURES.items():
        part = getattr(recipe, section)
        name = next((name for name in names if getattr(part, name) != getattr(type(part), name)
                     and (kind, name) != ("codes", "image_root")), None)  # clips may be files, too
        if name is not None:
            raise ConfigError(f"{section}.{name}: is of pictures, and likelihood.kind={kind} trains on {subject}; leave it "
                              "out")
    if not isinstance(recipe.source, Stored):
        raise ConfigError(f"source.kind: likelihood.kind={kind} reads stored {subject}; leave it at stored")
    for name in ("monitor",) if kind == "codes" else ("evaluate", "monitor"):
        if getattr(recipe, name) is not None:
            raise ConfigError(f"{name}: draws pictures, and likelihood.kind={kind} trains on {subject}; set it to null "
                              "(train.json has the held-out accuracy)")
    name = next((name for name in _OF_PIPELINES if recipe.evaluate is not None
                 and getattr(recipe.evaluate, name) != getattr(EvaluateSpec, name)), None)
    if name is not None:
        raise ConfigError(f"evaluate.{name}: is of pipelines, and likelihood.kind=codes draws code by code; leave it out")
    if getattr(recipe.reference, "gate", None) is not None:
        raise ConfigError(f"reference.gate: is measured on denoising errors, which {subject} has none of; set it to null")


def _check_paths(recipe: Recipe) -> None:
    """Step densities need samples with a path, drawn exactly as the estimator reads them."""
    estimator, source = recipe.likelihood, recipe.source
    if isinstance(source, Stepwise) and not isinstance(estimator, likelihood.Transitions):
        raise ConfigError("likelihood.kind: source.kind=stepwise compares single steps of the sampler, whose density is "
                          "likelihood.kind=transitions")
    if not isinstance(estimator, likelihood.Transitions) or isinstance(source, Stepwise):
        return
    if not isinstance(source, Online):
        raise ConfigError("likelihood.kind: 'transitions' reads the paths of samples, which source.kind=online and stepwise "
                          "draw; a data set's pictures have none, they need likelihood.kind=denoising")
    if source.sampler.solver == "ddim":
        raise ConfigError("source.sampler.solver: ddim is deterministic (eta 0), and a step without noise has no density; use "
                          "solver=ancestral, or lcm for models that were distilled for it")
    if len(source.sampler.times()) < 2:
        raise ConfigError("source.sampler.steps: one step leads straight to the picture and has no density; use more")
    if source.sampler.guidance_scale != 1:
        raise ConfigError("source.sampler.guidance_scale: must be 1 for whole paths (source.kind=online with "
                          "likelihood.kind=transitions); source.kind=stepwise knows guidance")


def check_layout(recipe: Recipe, layout: str) -> None:
    """Raises ConfigError when data of this layout cannot serve the objective. "auto" passes: nothing is known yet."""
    objective, title = recipe.objective, objectives.title_of(recipe.objective)
    if recipe.source.reads_prompts_only:
        return
    if layout == "prompts":
        raise ConfigError("data.layout: 'prompts' has no pictures; give preference data, or source.kind=online with a reward")
    if isinstance(recipe.source, SemiPolicy):  # winners and samples: pairs without scores
        layout = "pickapic"
    if layout == "unpaired" and objective.min_k > 1:
        raise ConfigError(f"data.layout: 'unpaired' has one picture a group, but {title} compares "
                          f"{objective.min_k}; use pairs or ranked lists, or objective.kind=kto")
    if layout in UNSCORED and objectives.needs_scores(objective):
        raise ConfigError(f"data.layout: '{layout}' has no scores, which {title} needs; use ranked lists (prompt, "
                          "images, scores), or data.layout=pickapic_scored where the columns score_0 and score_1 are")
