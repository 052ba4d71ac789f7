"""FSDP2: weights, gradients and the optimiser's state in shards, one on each process (`shard=true`).

torch's `fully_shard` gathers a unit where it runs and lets it go again. Units are the decoder layers, the vision tower, and the
output matrix where it is not the input matrix; embeddings and final norm belong to the root, which is gathered for the whole
chunk. Weights that train and frozen ones may differ in type.

Processes must gather the same units in the same order, or they deadlock. Therefore all of them run equally
many chunks, each chunk shows the vision tower an image, its own or a blank one (gradcache.py), and the tower is one unit
whatever the number of grids. Accelerate's plugin wraps each block instead, needs an accelerator, and refuses a scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from traceir.train.gradcache import Reader


def shard(reader: Reader, device: torch.device) -> None:
    """Divides the weights of a Reader among all processes, in place; they move to `device`.

    Its parameters are others afterwards: make the optimiser after this. Every process must hold the same weights.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    network, model = reader.network, reader.model
    for layer in network.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    tower: Any = network.model.visual
    fully_shard(tower, mesh=mesh)
    if network.config.model_type == "qwen2_5_vl":
        # `image_features` runs the tower's parts one by one, and so no hook of the tower's own: it gets hooks itself.
        tower.image_features = model.image_features
        register_fsdp_forward_method(tower, "image_features")
        model.__dict__["image_features"] = tower.image_features
    if not set(network.lm_head.parameters()) & set(network.model.language_model.embed_tokens.parameters()):
        fully_shard(network.lm_head, mesh=mesh)
    fully_shard(reader, mesh=mesh, ignored_params={reader.log_temperature})


def fetched(tensor: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """The tensor of all processes together, in host memory; each process must ask for it, without `keep` to get an empty one."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if keep else full.new_empty(0)


def own_part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor of which every process holds the whole, divided as `like` is; nothing is sent."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(reader: Reader, *, keep: bool) -> dict[str, torch.Tensor]:
    """The network's weights by name, `fetched` one by one; of a network with an adapter, those that train.

    Tied names share a tensor.
    """
    named: dict[str, torch.Tensor] = reader.network.state_dict(keep_vars=True)
    adapted = hasattr(reader.network, "peft_config")
    chosen = {name: tensor for name, tensor in named.items() if tensor.requires_grad or not adapted}
    full = {number: fetched(tensor, keep=keep) for number, tensor in {id(t): t for t in chosen.values()}.items()}
    return {name: full[id(tensor)] for name, tensor in chosen.items()}
