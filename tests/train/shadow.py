"""A device without hardware: CUDA's rules on the CPU's memory. ``python -m tests.train.shadow '[["configs/tiny/dpo.yaml"]]'``
trains recipes on it, each given as [file, override, ...], and prints their losses and what their steps waited for.

It is PyTorch's PrivateUse1, named ``shadow``. A tensor comes to it by DLPack, in whose header the device is changed, so that
both names mean the same memory; an operation runs in the CPU's kernel after it was checked that all its tensors lie on the
device. What may lie on the CPU beside tensors of CUDA's may do so here: numbers in element-wise operations, indices.
diffalign's own sources are read with ``shadow`` in the place of ``cuda``, so that what they do for CUDA alone is done here.

It can't show what the hardware decides: kernels, their rounding, streams, memory. Autocast has no rules for it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

CPU, SHADOW = 1, 12  # kDLCPU, kDLExtDev of dlpack.h
aten = torch.ops.aten

NUMBERS = set("add sub rsub mul div pow where masked_fill fill eq ne lt le gt ge maximum minimum lerp copy remainder".split())
INDEXED = {"index", "index_put", "_index_put_impl", "_unsafe_index"}
ASKED = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount", "multinomial"}

waits: list[tuple[str, list[str]]] = []  # what the host waited for, and the functions it was in, outermost first
_pinned: dict[int, torch.Tensor] = {}    # by address of their memory; kept, so that no other gets the address
_copying: list[tuple[torch.Tensor, torch.Tensor]] = []  # pinned memory that may still be read, and what it held

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _renamed(x: torch.Tensor, device: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(x)
    header = _pointer(capsule, b"dltensor")  # void *data; int32 device_type; int32 device_id
    ctypes.c_int32.from_address(header + 8).value, ctypes.c_int32.from_address(header + 12).value = device, 0
    with torch.inference_mode(False):  # views of ordinary tensors are ordinary ones
        return torch._C._from_dlpack(capsule)


def there(x: torch.Tensor) -> torch.Tensor:
    return _renamed(x.detach(), SHADOW)


def here(x: torch.Tensor) -> torch.Tensor:
    return _renamed(x, CPU)


def _is_there(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "shadow"


def _wait(what: str) -> None:
    waits.append((what, [frame.name for frame in traceback.extract_stack() if "/diffalign/" in frame.filename]))
    if any(not torch.equal(source, held) for source, held in _copying):
        raise RuntimeError("pinned memory was written to before its copy had ended")
    _copying.clear()


def _run(op, *args, **kwargs):
    """Any operation: checked as CUDA checks it, then the CPU's. Results and written arguments are on the device again."""
    name = op._schema.name.removeprefix("aten::").rstrip("_")  # add_ is add
    indices = [i for i in args[1] if i is not None] if name in INDEXED else []
    if name in ASKED or any(i.device.type == "cpu" or i.dtype == torch.bool for i in indices):
        _wait(name)
    free = {id(i) for i in indices}
    owners, strangers = {}, []

    def enter(value):
        if isinstance(value, (list, tuple)):
            return [enter(item) for item in value]
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{op}: a generator of the CPU for a tensor of the device")
        if _is_there(value):
            alias = here(value)
            owners[id(alias)] = alias, value
            return alias
        is_number = isinstance(value, torch.Tensor) and value.dim() == 0 and name in NUMBERS | INDEXED
        if isinstance(value, torch.Tensor) and not is_number and id(value) not in free:
            strangers.append(f"{value.dtype} {list(value.shape)}")
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def leave(value):
        if isinstance(value, torch.Tensor):
            return owners[id(value)][1] if id(value) in owners else there(value)
        return type(value)(leave(item) for item in value) if isinstance(value, (list, tuple)) else value

    outs = {a.name if a.kwarg_only else i for i, a in enumerate(op._schema.arguments) if a.is_out}
    given = {**dict(enumerate(args)), **kwargs}
    inside = {key: torch.empty(0, dtype=value.dtype) if key in outs else enter(value) for key, value in given.items()}
    if strangers:
        raise RuntimeError(f"{op}: tensors on two devices: {', '.join(strangers)} on the CPU")
    found = REPLACED.get(name, op)(*(inside[i] for i in range(len(args))), **{key: inside[key] for key in kwargs})
    for key in outs:  # memory that came by DLPack cannot grow, so the CPU's kernel was given its own
        _put(given[key], inside[key])
        owners[id(inside[key])] = inside[key], given[key]
    for alias, value in owners.values():
        if op._schema.is_mutable and (alias.shape, alias.stride()) != (value.shape, value.stride()):
            value.data = there(alias)
    return leave(found)


def _put(value: torch.Tensor, made: torch.Tensor) -> None:
    if value.shape == made.shape:
        here(value).copy_(made)
    else:
        value.data = there(made)


def _resize(x, size, memory_format=None):
    if tuple(size) != tuple(x.shape):
        x.data = there(torch.empty(size, dtype=x.dtype))
    return x


def _copy(source, target, non_blocking=False):
    """To the CPU, nobody may go on before the copy has ended; from it, only pinned memory lets one go on."""
    if not _is_there(target):
        if non_blocking:
            raise RuntimeError("a copy to the CPU that nobody waits for")
        _wait("to the CPU")
    elif not _is_there(source):
        if non_blocking and source.untyped_storage().data_ptr() in _pinned:
            _copying.append((source, source.clone()))
        else:
            _wait("from pageable memory")
    (here(target) if _is_there(target) else target).copy_(here(source) if _is_there(source) else source)
    return target


def _pin(x: torch.Tensor, device=None) -> torch.Tensor:
    if x.untyped_storage().data_ptr() not in _pinned:
        x = x.clone()
        _pinned[x.untyped_storage().data_ptr()] = x
    return x


def _convolution_backward(grad, x, weight, stride, padding, dilation, transposed, output_padding, groups, mask):
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return aten.convolution_backward(grad, x, weight, [channels], stride, padding, dilation, transposed, output_padding,
                                     groups, mask)


REPLACED = {"convolution_overrideable": aten.convolution, "convolution_backward_overrideable": _convolution_backward}


class _Cuda(_DummyBackendModule):
    """What stands for ``torch.cuda``."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def empty_cache(self):
        """Nothing is kept."""

    def get_device_name(self, device=None):
        return "shadow"


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        source = Path(self.path).read_text().replace('"cuda"', '"shadow"').replace("torch.cuda", "torch.shadow")
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name.split(".")[0] == "diffalign" else None
        if spec is not None:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def register() -> list[torch.library.Library]:
    """Once in a process, before anything of diffalign is imported. The device lives as long as what this returns."""
    _setup_privateuseone_for_python_backend(rename="shadow", backend_module=_Cuda())
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return there(torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return there(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    for name, kernel in {"empty.memory_format": empty, "empty_strided": empty_strided, "resize_": _resize, "_copy_from": _copy,
                         "_fused_sdp_choice": lambda *args, **kwargs: 0}.items():  # 0: attention in plain operations
        own.impl(name, kernel, "PrivateUse1")
    for name in (*REPLACED, "native_group_norm", "native_layer_norm"):  # PyTorch has kernels for any device: not the CPU's
        op = getattr(aten, name).default
        own.impl(name, lambda *args, op=op, **kwargs: _run(op, *args, **kwargs), "PrivateUse1")
    torch.Tensor.pin_memory = _pin
    os.environ["ACCELERATE_TORCH_DEVICE"] = "shadow"
    sys.meta_path.insert(0, _Finder)
    return [every, own]


def main(runs: list[list[str]]) -> list[dict]:
    """Recipes that train: losses by step, and what their steps waited for."""
    from diffalign.config import load_recipe
    from diffalign.run import train
    found = []
    for path, *overrides in runs:
        waits.clear()
        recipe = load_recipe(path, overrides)
        train(recipe)
        lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
        found.append({"figures": [[line["loss"], line["grad_norm"]] for line in lines if "loss" in line],
                      "waits": [[what, inside[-1]] for what, inside in waits if "_gradients" in inside]})
    return found


if __name__ == "__main__":
    kept = register()
    print(json.dumps(main(json.loads(sys.argv[1]))))
