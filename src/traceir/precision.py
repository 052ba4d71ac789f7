"""Whether a model is faster in bfloat16 than in float32: asked of the device and, on a CPU, measured.

A processor without bfloat16 instructions computes in it all the same, several to fifty times as slowly. With them it depends on
torch's kernels, on what the system enables, and on the width: in narrow layers the casts cost more than the products gain.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

ROWS: Final = 16
LAYERS: Final = 2
TRIES: Final = 3
GAIN: Final = 0.9
"""float32 is the more exact type: bfloat16 must take at most so much of its time."""
WIDEST: Final = 512
"""Wider layers only widen the difference and take longer to measure."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Whether bfloat16 is the faster type, how that is known, and whether it is the slower one, which is worth a warning."""

    fast: bool
    why: str
    slow: bool = False


@functools.cache
def bfloat16_on(device: str, width: int = WIDEST) -> Speed:
    """The answer for a torch device and a model's width; on a CPU it takes about a second. Draws no random number."""
    kind = torch.device(device).type
    if kind == "cuda":
        name, native = torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
        why = f"{name} has {'bfloat16 units' if native else 'no bfloat16 units and emulates them'}"
        return Speed(native, why, slow=not native)
    if kind != "cpu":
        from transformers.utils import is_torch_bf16_gpu_available

        native = kind != "mps" and is_torch_bf16_gpu_available()  # some of Apple's GPUs emulate it, and none says so
        return Speed(native, f"torch {'says' if native else 'does not say'} that {kind} has bfloat16 units", slow=not native)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # missing where torch is built without oneDNN
    if supported is None or not supported():
        return Speed(False, "torch has no bfloat16 kernels for this processor (AVX512-BF16, AMX or Arm's BF16)", slow=True)
    width, spent = min(width, WIDEST), {True: float("inf"), False: float("inf")}
    for number in range(TRIES):
        for half in spent:
            # Each try has a length of its own, as batches have: oneDNN makes a kernel for every new shape.
            spent[half] = min(spent[half], _seconds(width, 40 + number, half))
    ratio = spent[True] / spent[False]
    has = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    names = f" ({', '.join(name for name, there in has.items() if there)})" if any(has.values()) else ""
    why = f"layers of width {width} take {ratio:.2f} times as long in bfloat16 on this processor{names}"
    return Speed(ratio <= GAIN, why, slow=ratio * GAIN > 1.0)


def _seconds(width: int, length: int, half: bool) -> float:
    """Two layers of a transformer forward and backward over 16 rows, in autocast to bfloat16 if `half`."""
    heads, inner = max(1, width // 32), 3 * width
    shapes = ((3 * heads * 32, width), (width, heads * 32), (2 * inner, width), (width, inner))
    with torch.enable_grad():
        state = torch.full((ROWS, length, width), 0.5)
        weights = [torch.full(shape, 0.01, requires_grad=True) for shape in shapes]
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for _ in range(LAYERS):
                mixed = functional.linear(functional.rms_norm(state, (width,)), weights[0])
                query, key, value = mixed.view(ROWS, length, 3, heads, 32).permute(2, 0, 3, 1, 4)
                mixed = (query @ key.transpose(-1, -2)).float().softmax(-1).to(value.dtype) @ value
                state = state + functional.linear(mixed.transpose(1, 2).flatten(2), weights[1])
                gate, up = functional.linear(functional.rms_norm(state, (width,)), weights[2]).chunk(2, -1)
                state = state + functional.linear(functional.silu(gate) * up, weights[3])
        torch.autograd.backward(state.float().sum())
        return time.perf_counter() - began
