"""The command line: ``diffalign COMMAND CONFIG [key=value ...]``; a command is a line of ``_COMMANDS``.

User errors print one line and exit with 2; a run stopped by a signal saves and exits with 75; tracebacks are our bugs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from . import __version__
from .errors import ResourceError, UserError

GRACE = 3.0  # seconds in which a launcher ends the other processes after one has failed

CONFIG = ("CONFIG", "a recipe, such as configs/quickstart.yaml")
REWARDS = ("REWARDS", "kinds separated by commas, a YAML mapping of names to rewards, or a .yaml file that holds one")
GALLERY = ("GALLERY", "JSONL table with the columns prompt, model, image, or its folder")
ACTION = ("ACTION", "evolve, train or rewrite")
DATA = ("DATA", "parquet, CSV, JSON or JSONL file, or a folder of pictures or of a build")


@dataclass(frozen=True)
class _Command:
    """load: a function of ``diffalign.config`` that makes the spec from the positionals and the overrides. The function of the
    command's own name, with _ for -, in ``diffalign.run`` takes the spec, and its switches (name, help) and settings (name,
    type, default, help) as keywords.
    """

    summary: str
    positionals: tuple[tuple[str, str], ...] = (CONFIG,)
    load: str = "load_recipe"
    switches: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, type, object, str], ...] = ()


_COMMANDS = {
    "train": _Command("align the model; run the same command again to resume"),
    "encode": _Command("build the cache of latents and text embeddings, and stop", switches=(
        ("reference", "measure the frozen reference's errors too: training then never runs it, whatever beta, link or "
                      "learning rate"),)),
    "check": _Command("look at data and options before the machine gets warm: counts, ties, leakage, derived numbers, sample "
                      "pairs"),
    "plan": _Command("what a run will need, before anything is downloaded: memory by part, pairs a second, hours, disk, and "
                     "the option to change where it does not fit", settings=(
        ("gpu", str, "h100", "name of the card, such as h200, a100-80, 4090"),
        ("gpus", int, 1, "how many of them"),
        ("sharding", str, "none", "none, or how the weights are cut over them: fsdp2, zero2 (configs/accelerate)"),
        ("efficiency", float, 0.2, "share of the card's data-sheet rate that training reaches: an assumption"),
        ("json", str, None, "write the plan to this file, too"))),
    "evaluate": _Command("compare base, aligned and other models on the same prompts and seeds: win rates with intervals, "
                         "report, grid", load="load_evaluation"),
    "grid": _Command("draw the comparison grid only: PNG, WebP and a page to look at it", load="load_evaluation"),
    "build": _Command("make preference data: prompts, samples, rewards, ranked groups or pairs; run it again to resume",
                      load="load_build"),
    "rich": _Command("make preference data by critique and edit: a VLM says what is wrong, an editor mends it, a reward "
                     "decides; run it again to resume", load="load_rich"),
    "prompts": _Command("a language model learns to write prompts that a frozen pipeline follows better: evolve a pool of "
                        "prompts, train on it, rewrite; run it again to resume", (ACTION, CONFIG), "load_prompts"),
    "train-reward": _Command("learn a reward from preferences: a Bradley-Terry or a pluralistic (PAL) head on a CLIP",
                             load="load_reward_recipe"),
    "score": _Command("write rewards' scores of a data set or a folder of pictures as columns; run it again to resume",
                      (REWARDS, DATA), "load_score"),
    "arena": _Command("serve a page where people rank anonymous pictures of several models; votes become ratings and, with "
                      "export=FOLDER, preference data", (GALLERY,), "load_arena"),
}

_EPILOG = """\
CONFIG is a recipe (YAML); key=value overrides any option by its path, for example
  diffalign train configs/sdxl/dpo_lora.yaml output_dir=runs/mine objective.beta=2000 train.learning_rate=2e-5
  diffalign build configs/build/tiny.yaml samples=8 select.kind=all_pairs
  diffalign score scenes,brightness pictures/
  diffalign prompts evolve configs/text/rewriter_tiny.yaml
Several GPUs: accelerate launch -m diffalign train CONFIG ...
Recipes to start from lie in configs/."""


class _Once(argparse.Action):
    """Of two values argparse would take the last without a word."""

    def __call__(self, parser, namespace, value, option_string=None):
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            parser.error(f"argument {option_string}: is given twice; keep one")
        given.add(self.dest)
        setattr(namespace, self.dest, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffalign", description="Preference alignment for diffusion models.",
                                     epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, known in _COMMANDS.items():
        summary = known.summary
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EPILOG,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        for metavar, meaning in known.positionals:
            command.add_argument(metavar.lower(), metavar=metavar, help=meaning)
        command.add_argument("overrides", nargs="*", metavar="key=value",
                             help="options by path, such as train.learning_rate=1e-5")
        for switch, meaning in known.switches:
            command.add_argument(f"--{switch}", action="store_true", help=meaning)
        for setting, kind, default, meaning in known.settings:
            command.add_argument(f"--{setting}", type=kind, default=default, metavar=setting.upper(), help=meaning,
                                 action=_Once)
        command.add_argument("--rewards-from", metavar="FILE.py", action="append", default=[],
                             help="make the rewards of a Python file of yours known under their names (it is run)")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _quiet_libraries() -> None:
    """Bars, notices of loading and hoarded memory belong to the libraries' own users. Whoever sets these variables keeps the
    last word. No library is imported for it: they read them when they are."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # its own keeps 10 to 20 MiB of what was freed
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    for library in {"diffusers", "transformers"} & set(sys.modules):  # of a program that calls ``main``
        import_module(f"{library}.utils.logging").disable_progress_bar()


def _check_temporary() -> None:
    """Libraries ask for it while they are imported, with an error of their own where every disk is full."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ResourceError(f"no folder for temporary files can be written in ({error.strerror}); free some space, or name "
                            "one in TMPDIR") from None


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value may stand anywhere, behind --rewards-from FILE too, where argparse itself takes no more of them."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (a recipe's options are key=value, without dashes)")
    args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for something the user can mend, 75 stopped by a signal and ready to resume."""
    args = _parsed(argv)
    with _sturdy_output():
        try:
            _quiet_libraries()
            _check_temporary()
            from . import config, run, world  # here, so that --help needs no torch
            for file in args.rewards_from:
                config.rewards_from(file)
            command = _COMMANDS[args.command]
            given = [getattr(args, metavar.lower()) for metavar, _ in command.positionals]
            switches = {name: getattr(args, name) for name, *_ in (*command.switches, *command.settings)}
            config.check_given_once(args.overrides, [metavar.lower() for metavar, _ in command.positionals])
            spec = getattr(config, command.load)(*given, args.overrides)
            with world.left_in_order():
                getattr(run, args.command.replace("-", "_"))(spec, printer=_printed, **switches)
            return 0
        except UserError as error:
            if args.debug:
                raise
            _say_once(f"diffalign: {_line(str(error))}")
            return error.exit_code
        except KeyboardInterrupt:
            _say_once("diffalign: interrupted")
            return 130


def _tame(text: str) -> str:
    """Text that steers no terminal: prompts and names of files and of archives' members may hold anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _line(text: str) -> str:
    return _tame(" ".join(text.split()))


def _printed(text: str) -> None:
    print(_tame(text))


def _say_once(text: str) -> None:
    """All processes of a run meet the same error; the first says it. Another one waits for the launcher to end it, and
    speaks only if that does not happen: then the error was its own."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(GRACE)
    print(text, file=sys.stderr)


class _Sturdy:
    """A text stream whose reader may leave and whose disk may fill: a run of days must not end because nobody listens."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action, *args) -> None:
        try:
            action(*args)
        except (OSError, ValueError):  # ValueError: closed
            self._stream = open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)


@contextmanager
def _sturdy_output():
    """stdout and stderr that never raise: absent, closed, a broken pipe, or unable to spell a letter of a path."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (_Sturdy(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


if __name__ == "__main__":
    raise SystemExit(main())
