"""Imports: cheap where they should be, and possible beside a torchvision that does not fit torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

BROKEN = '''
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
'''


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_specs_are_cheap():
    done = python("import sys; from diffalign.models import LoRA, ModelSpec; import diffalign.models as m; "
                  "assert 'WeightBank' in m.__all__; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    done = python("import diffalign.models as m; [getattr(m, name) for name in m.__all__]; "
                  "from diffalign.models import WeightBank")
    assert done.returncode == 0, done.stderr


def test_torchvision_whose_operators_do_not_load(tmp_path):
    """A stand-in with the real one's fault: a compiled part that cannot be loaded, then fakes for its operators."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"not a library")
    (package / "__init__.py").write_text(BROKEN)
    assert "torchvision::nms" in python("import torchvision", tmp_path).stderr     # the fault itself
    done = python("from diffalign import _compat; import torchvision; assert not _compat.declare_torchvision_operators()",
                  tmp_path)
    assert done.returncode == 0, done.stderr


def test_torchvision_that_is_sound_or_absent(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    done = python("from diffalign import _compat; assert _compat._library is None; import torchvision", tmp_path)
    assert done.returncode == 0, done.stderr
