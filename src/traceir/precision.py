"""Whether a device is faster in bfloat16 than in float32: asked of the device and, on a CPU, tried as well.

A processor without bfloat16 instructions computes in it all the same, several to fifty times as slowly as in float32; with them
it depends on the kernels that torch has for them and on what the system lets through. So both types are tried.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Final

import torch

ROWS: Final = 512
WIDTH: Final = 256
"""A product as small models make it; larger ones only part the two types further."""
TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class Speed:
    """Whether bfloat16 is the faster type, and how that is known."""

    fast: bool
    why: str


@functools.cache
def bfloat16_on(device: str) -> Speed:
    """The answer for a torch device; a few milliseconds once in a process. Draws no random number."""
    kind = torch.device(device).type
    if kind == "cpu":
        return _on_the_processor()
    if kind == "cuda":
        name, native = torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
        return Speed(native, f"{name} has {'bfloat16 units' if native else 'no bfloat16 units and emulates them'}")
    from transformers.utils import is_torch_bf16_gpu_available

    native = kind != "mps" and is_torch_bf16_gpu_available()  # some of Apple's GPUs emulate it, and none says so
    return Speed(native, f"torch {'says' if native else 'does not say'} that {kind} has bfloat16 units")


def _on_the_processor() -> Speed:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # missing where torch is built without oneDNN
    if supported is None or not supported():
        return Speed(False, "torch has no bfloat16 kernels for this processor (AVX512-BF16, AMX or Arm's BF16)")
    spent = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(TRIES):
        for dtype in spent:
            spent[dtype] = min(spent[dtype], _seconds(dtype))
    ratio = spent[torch.bfloat16] / spent[torch.float32]
    has = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    names = f" ({', '.join(name for name, there in has.items() if there)})" if any(has.values()) else ""
    return Speed(ratio < 1, f"a bfloat16 product takes {ratio:.2f} times as long as a float32 one on this processor{names}")


def _seconds(dtype: torch.dtype) -> float:
    """A linear layer forward and backward."""
    with torch.enable_grad():
        rows, weight = (torch.ones(count, WIDTH, dtype=dtype, requires_grad=True) for count in (ROWS, WIDTH))
        began = time.perf_counter()
        torch.autograd.backward(torch.nn.functional.linear(rows, weight).sum())
        return time.perf_counter() - began
