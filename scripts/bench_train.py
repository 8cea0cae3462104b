"""Pairs per second of Diffusion-DPO: the usual recipe beside diffalign with a live and with a measured reference.

    python scripts/bench_train.py [--model sdxl] [--rounds 5] [--steps 4] [--lever NAME ...] [--json FILE]

Call it from the repository root. Each path is a process of its own that waits for its turn: a round lets one after another
train so many steps, so that a busy machine slows all of them alike, and ratios are medians over rounds. "usual" is what public
scripts do (diffusers' train_diffusion_dpo_sdxl.py, written anew): VAE and text encoders in the loop, policy and reference one
after the other, eager. Encoding is timed on as many pairs a round and counted once over --epochs. A measured reference costs a
pass a pair and visit, which a sweep pays once; the table of sweeps says what that makes. A lever is one change of the live
path, in a process of its own beside it; its ratio is to the live path, encoding left out.
--model tiny is the embedded model; sdxl has random weights in the published shapes (written to --work, 7 GB) and random
pictures; narrow has SDXL's layers, all of them thin, on small pictures: what is left is the host's time a layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.work import NARROW, SIDES, write_recipe
from bench.worker import LEVERS, work

PATHS = ("usual", "live", "measured", "encode")
SHOWN = ("usual", "live", "measured", "encode", "reference")
SWEEPS = (1, 2, 4, 8, 16)


# --- the other end of the pipes -----------------------------------------------------------------------------------------

class Stopped(SystemExit):
    """A path's process ended before its time."""


class Worker:
    def __init__(self, path: str, file: Path, options):
        command = [sys.executable, __file__, "--worker", path, "--recipe", str(file), "--steps", str(options.steps)]
        self.path, self.log = path, file.parent / f"{path}.log"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
                                        text=True)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Stopped(f"bench_train: the path '{self.path}' stopped; its output:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def turn(self, order: str = "go") -> dict:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.answer()


def prepare(file: Path) -> None:
    """Latents and text for both of diffalign's paths, the reference's errors for one: their caches lie apart."""
    folder = file.parent / "measured"
    command = [sys.executable, "-m", "diffalign", "encode", str(file), "--reference", f"output_dir={folder}"]
    done = subprocess.run([*command, f"data.cache_dir={folder / 'cache'}"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_train: {done.stderr[-3000:]}")
    shutil.copytree(folder / "cache", file.parent / "live" / "cache", ignore=shutil.ignore_patterns("reference-*"))


def needed(model: str, rank: int, latent: int) -> tuple[int, int]:
    """FLOP a pair: of the policy's forward and backward, and of the reference's forward. Nothing recomputed."""
    import torch

    from diffalign.models import LoRA, attach
    from diffalign.models.counts import flops
    from diffalign.models.published import SDXL_SCHEDULER, SDXL_UNET, on_meta

    tiny = json.loads(Path("assets/tiny-sdxl/unet/config.json").read_text())
    config = {**SDXL_UNET, **{"sdxl": {}, "narrow": NARROW["unet"], "tiny": tiny}[model]}
    denoiser = on_meta("sdxl", config, SDXL_SCHEDULER)
    base, _ = flops(denoiser, 2, latent, latent)
    if rank:
        with torch.device("meta"):
            attach(denoiser, LoRA(rank=rank), seed=0)
    else:
        denoiser.module.requires_grad_(True)
    return flops(denoiser, 2, latent, latent)[1], base


def bench(options) -> dict:
    from diffalign.cli import _quiet_libraries
    _quiet_libraries()
    work = Path(options.work or tempfile.mkdtemp(prefix="bench_train-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        say("making the model's and the pairs' files, encoding and measuring the reference")
        file = write_recipe(options, work)
        prepare(file)
        planned = plan_of(file)
        found = run_rounds(file, options)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    policy, reference = needed(options.model, options.rank, options.resolution // (4 if options.model == "tiny" else 8))
    return {**summary(options, *found, policy, reference), "planned_bytes": planned}


def plan_of(file: Path) -> dict[str, int]:
    """What ``diffalign plan`` says of the live path's memory, by part."""
    from diffalign.config import load_recipe
    from diffalign.run.plan import plan
    return plan(load_recipe(file), gpu="h200")["memory_bytes"]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def asked(worker: Worker, question: Callable[[Worker], dict]) -> dict | None:
    """The worker's answer; None, and a line, where a lever does not work here. Raises Stopped for one of the four paths."""
    try:
        answer = question(worker)
        note = answer.get("note")
    except Stopped as error:
        if worker.path in PATHS:
            raise
        answer, note = None, str(error).strip().splitlines()[-1]
    if note:
        worker.process.kill()
        say(f"{worker.path}: not measured: {note}")
        return None
    return answer


def run_rounds(file: Path, options) -> tuple[list[dict], dict, dict]:
    """Seconds a pair by path and round; what the turn with a watch on said, by path; peak bytes."""
    names, pairs = [*PATHS, *(f"live+{lever}" for lever in options.lever)], options.steps * options.batch
    rounds, stages, peaks = [{} for _ in range(options.rounds)], {}, {}
    for some in [[name] for name in names] if options.apart else [names]:
        workers = [Worker(name, file, options) for name in some]
        say(f"{', '.join(some)}: loading, first steps (a compiler takes a minute or more)")
        workers = [worker for worker in workers if asked(worker, Worker.answer)]
        for number, found in enumerate(rounds):
            for worker in list(workers):
                answer = asked(worker, Worker.turn)
                if answer is None:
                    workers.remove(worker)
                    continue
                found.update(answer if worker.path == "encode" else {worker.path: answer["seconds"] / pairs})
            speeds = (f"{name} {1 / found[name]:.3g}" for name in (*SHOWN, *names[len(PATHS):]) if name in found)
            say(f"round {number + 1}/{options.rounds}: {', '.join(speeds)} pairs/s")
        for worker in workers:
            if worker.path in SHOWN[:3]:
                stages[worker.path] = worker.turn("stages")
            if worker.path == "live" and options.profile:
                Path(options.profile).write_text(worker.turn("profile")["profile"])
            peaks[worker.path] = worker.turn("end")["peak"]
    return rounds, stages, peaks


# --- figures ------------------------------------------------------------------------------------------------------------

def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def summary(options, rounds, stages, peaks, policy: int, reference: int) -> dict:
    """Ratios are taken inside a round, then their median. Seconds a pair: training, plus encoding over the epochs."""
    import torch

    epochs, paths, sweeps = options.epochs, {}, {}
    for path in PATHS[:3]:
        once = 0.0 if path == "usual" else 1 / epochs
        whole = [r[path] + once * r["encode"] for r in rounds]
        work = policy + (0 if path == "measured" else reference)
        share, total = stages[path]["stages"], stages[path]["seconds"]
        paths[path] = {
            "pairs_per_s": spread([1 / s for s in whole]), "without_encoding": spread([1 / r[path] for r in rounds]),
            "ratio": spread([r["usual"] / s for r, s in zip(rounds, whole)]), "peak_bytes": peaks[path],
            "mfu": median([work / r[path] / r["matrix_flop_per_s"] for r in rounds]),
            "stages": {**{name: s / total for name, s in share.items()}, "rest": 1 - sum(share.values()) / total}}
    for runs in SWEEPS:  # the usual recipe encodes in every run; the measured one encodes and measures once for all of them
        live = median([r["usual"] / (r["live"] + r["encode"] / epochs / runs) for r in rounds])
        measured = median([r["usual"] / (r["measured"] + (r["encode"] / epochs + r["reference"]) / runs) for r in rounds])
        sweeps[str(runs)] = {"live": live, "measured": measured}
    levers = {name.partition("+")[2]: {"ratio": spread([r["live"] / r[name] for r in rounds]), "peak_bytes": peak}
              for name, peak in peaks.items() if "+" in name}
    best = max(("live", "measured"), key=lambda path: paths[path]["ratio"]["median"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread"
    return {"usual_pairs_per_s": paths["usual"]["pairs_per_s"]["median"], "best": best,
            "diffalign_pairs_per_s": paths[best]["pairs_per_s"]["median"], "ratio": paths[best]["ratio"]["median"],
            "paths": paths, "levers": levers, "sweeps": sweeps,
            "encode_pairs_per_s": spread([1 / r["encode"] for r in rounds]),
            "reference_pairs_per_s": spread([1 / r["reference"] for r in rounds]),
            "flop_per_pair": {"policy": policy, "reference": reference},
            "matrix_flop_per_s": spread([r["matrix_flop_per_s"] for r in rounds]),
            "options": vars(options), "device": device, "date": time.strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}, "rounds": rounds}


def table(found: dict) -> str:
    lines = ["| path | pairs/s, encoding included | ratio to usual (min-max) | MFU | peak memory | share of time |",
             "|---|---:|---:|---:|---:|---|"]
    for path, one in found["paths"].items():
        ratio = one["ratio"]
        stages = ", ".join(f"{name} {share:.0%}" for name, share in sorted(one["stages"].items(), key=lambda x: -x[1]))
        lines.append(f"| {path} | {one['pairs_per_s']['median']:.3g} | {ratio['median']:.2f} "
                     f"({ratio['low']:.2f}-{ratio['high']:.2f}) | {one['mfu']:.1%} | "
                     f"{one['peak_bytes'] / 2**30:.2f} GiB | {stages} |")
    lines += ["", "| runs of a sweep | live | measured, its pass included |", "|---:|---:|---:|"]
    lines += [f"| {runs} | {one['live']:.2f} | {one['measured']:.2f} |" for runs, one in found["sweeps"].items()]
    if found["levers"]:
        lines += ["", "| lever | ratio to live (min-max) | peak memory |", "|---|---:|---:|"]
        lines += [f"| {name} | {one['ratio']['median']:.2f} ({one['ratio']['low']:.2f}-{one['ratio']['high']:.2f}) | "
                  f"{one['peak_bytes'] / 2**30:.2f} GiB |" for name, one in found["levers"].items()]
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(SIDES), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--batch", type=int, help="pairs of a step (16; sdxl: 4)")
    parser.add_argument("--rank", type=int, help="of the LoRA (16; sdxl: 64); 0: all weights are trained")
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw", help="of diffalign's paths")
    parser.add_argument("--precision", choices=("no", "bf16"), help="mixed precision (no; sdxl: bf16)")
    parser.add_argument("--resolution", type=int, help="pixels of a side (64; sdxl: 1024)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all paths")
    parser.add_argument("--lever", nargs="+", choices=tuple(LEVERS), default=[], metavar="NAME",
                        help=f"changes of the live path to measure, each alone: {', '.join(LEVERS)}")
    parser.add_argument("--apart", action="store_true", help="one path after another, where memory holds one at a time")
    parser.add_argument("--epochs", type=int, default=3, help="epochs that encoding is counted over")
    parser.add_argument("--work", help="folder for models and caches, kept; else a temporary one")
    parser.add_argument("--profile", metavar="FILE", help="write the live path's operations there, the dearest first")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    large = options.model == "sdxl"
    options.batch = options.batch or (4 if large else 16)
    options.rank = options.rank if options.rank is not None else (64 if large else 16)
    options.resolution = options.resolution or SIDES[options.model]
    options.precision = options.precision or ("bf16" if large else "no")
    return options


def main() -> int:
    options = arguments()
    if options.worker:
        work(options.worker, options.recipe, options.steps)
        return 0
    found = bench(options)
    print(table(found))
    print(f"\nratio {found['ratio']:.2f} ({found['best']}; {found['device']})")
    if not found["device"].startswith("CPU"):
        print(f"planned for live: {sum(found['planned_bytes'].values()) / 2**30:.2f} GiB, CUDA's context included")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
