"""What we ship to start several processes: accelerate reads it, torch and SLURM start what it says."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from diffalign.train.sharding import check_launch, is_asked

from ..train import toy

ROOT = Path(__file__).parents[2]
CONFIGS, LAUNCH = ROOT / "configs" / "accelerate", ROOT / "scripts" / "launch"


def variables(name: str, *more: str) -> dict[str, str]:
    """The environment that ``accelerate launch`` gives to each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env
    file = CONFIGS / f"{name}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", *more, "-m", "diffalign"])
    args, _, _ = _validate_launch_command(args)
    several = {"multi_gpu": str(args.multi_gpu or args.use_fsdp), "machines": str(args.num_machines)}
    return prepare_multi_gpu_env(args) | several


@pytest.mark.parametrize("name, sharded, reshard", [("ddp", False, None), ("fsdp2", True, "true"), ("zero2", True, "false"),
                                                    ("multi_node", False, None), ("hsdp", True, "true")])
def test_accelerate_reads_our_configurations(monkeypatch, name, sharded, reshard):
    theirs = ("FSDP", "ACCELERATE", "PARALLELISM")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith(theirs)})
    several = name in ("multi_node", "hsdp")
    more = ("--machine_rank", "1", "--main_process_ip", "10.0.0.1") if several else ()
    found = variables(name, *more)
    assert found["multi_gpu"] == "True" and found["machines"] == ("2" if several else "1")
    os.environ.update(found, WORLD_SIZE="16" if several else "8")
    assert is_asked() == sharded
    check_launch(toy.spec())  # nothing that the loop refuses
    if sharded:
        assert found["FSDP_VERSION"] == "2" and found["FSDP_RESHARD_AFTER_FORWARD"].lower() == reshard


def test_no_configuration_is_left_out():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"ddp", "fsdp2", "zero2", "multi_node", "hsdp"}


def fake(folder: Path, name: str, script: str) -> str:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def launch(script: str, *args: str, **variables: str):
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    return subprocess.run(["bash", str(LAUNCH / script), *args], env={**clean, **variables}, capture_output=True, text=True,
                          cwd=ROOT, timeout=60)


SAY = ('echo "$*" "|" ${RANK:-} ${LOCAL_RANK:-} ${WORLD_SIZE:-} ${MASTER_ADDR:-} ${FSDP_RESHARD_AFTER_FORWARD:-} '
       '${PARALLELISM_CONFIG_DP_REPLICATE_SIZE:-} ${PARALLELISM_CONFIG_DP_SHARD_SIZE:-}')


def test_torchrun_on_one_machine_and_on_several(tmp_path):
    python = fake(tmp_path, "python", SAY)
    one = launch("torchrun.sh", "train", "CONFIG", "a=1", PYTHON=python, PROCESSES="2", SHARDING="zero2")
    assert one.stdout.split("|")[0].split() == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
                                                "diffalign", "train", "CONFIG", "a=1"]
    assert one.stdout.endswith("false\n")
    four = launch("torchrun.sh", "train", "CONFIG", PYTHON=python, PROCESSES="8", NODES="4", HEAD="node1",
                  SHARDING="hsdp").stdout
    assert four.endswith("| true 4 8\n")
    assert "--nnodes 4 --rdzv_backend c10d --rdzv_id diffalign --rdzv_endpoint node1:29500 --nproc_per_node 8" in four
    for wrong, said in (({"SHARDING": "zero9"}, "choose none, fsdp2, zero2 or hsdp"), ({"NODES": "2"}, "set HEAD"),
                        ({"PROCESSES": "0"}, "no GPU found")):
        result = launch("torchrun.sh", "train", "CONFIG", **{"PYTHON": python, "PROCESSES": "2", **wrong})
        assert result.returncode != 0 and said in result.stderr


@pytest.mark.parametrize("code, requeued, sharding, said", [(0, False, "fsdp2", "true"), (2, False, "none", ""),
                                                           (75, True, "hsdp", "true 2 8")])
def test_slurm_starts_a_process_a_task_and_queues_again_what_was_stopped(tmp_path, code, requeued, sharding, said):
    python = fake(tmp_path, "my_python", f"{SAY}\nexit {code}")
    fake(tmp_path, "srun", 'shift\ncode=0\nfor i in 0 1; do SLURM_PROCID=$((8 + i)) SLURM_LOCALID=$i "$@" || code=$?; done\n'
                           'exit $code')
    fake(tmp_path, "scontrol", 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $*"; fi')
    result = launch("slurm.sbatch", "train", "CONFIG", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=python,
                    SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="77", SLURM_NTASKS="16",
                    SLURM_NTASKS_PER_NODE="8", SHARDING=sharding)
    lines = result.stdout.splitlines()
    assert [line.rstrip() for line in lines[:2]] == [f"-m diffalign train CONFIG | {rank} {rank - 8} 16 node1 {said}".rstrip()
                                                     for rank in (8, 9)]
    assert (lines[2:] == ["scontrol requeue 77"]) == requeued and result.returncode == code, result.stderr
