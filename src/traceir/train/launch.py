"""What a launch over several processes cannot do, said before data and model are read.

What can: DDP and shards (shard.py), by torchrun or by `accelerate launch` without plugins. FSDP, DeepSpeed, Megatron-LM and
tensor or context parallelism by accelerate wrap a model in ways that a joint loss over many chunks does not go through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from traceir.errors import InputError, TrainError

PLUGINS: Final = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
"""What accelerate's launcher sets, and what it then stands for."""
REMEDY: Final = "start it with torchrun, and set shard=true to divide weights, gradients and AdamW's state among the processes"
FORMER: Final = {"fsdp": "FSDP's settings file", "deepspeed": "DeepSpeed"}


def refuse_settings(settings: Sequence[str]) -> None:
    """InputError for settings of earlier releases that never ran."""
    for setting in settings:
        if (name := setting.partition("=")[0].strip()) in FORMER:
            raise InputError(f"--set {setting}: {FORMER[name]} is not supported; {REMEDY}")


def refuse_plugins(environment: Mapping[str, str]) -> None:
    """TrainError where accelerate's launcher asks for a wrapping that does not work here."""
    for variable, plugin in PLUGINS.items():
        if environment.get(variable, "false").lower() == "true":
            raise TrainError(f"accelerate was told to use {plugin} ({variable}=true), which is not supported; {REMEDY}")


def check_shares(batch: int, world: int) -> None:
    """TrainError where a batch cannot be dealt out evenly."""
    if batch % world:
        raise TrainError(f"batch {batch} does not divide among {world} processes; choose a multiple")


def check_world(*, batch: int, shard: bool, world: int) -> None:
    """TrainError where the number of processes does not go with the configuration."""
    check_shares(batch, world)
    if shard and world == 1:
        raise TrainError("shard=true divides the weights among processes, and this is the only one; start it with torchrun")
