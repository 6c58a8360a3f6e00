"""An estimate of the memory that a training step takes.

    python train.py         # prints it before the first step
"""
import torch

import loader
import network
import settings
from heads import ASPP


def estimate_memory(n_classes: int, precision: str, world_size: int = 1) -> float:
    """Return the peak memory of a training step in GB, roughly.

    It is the sum of the tensors that the forward pass saves for the backward pass, the
    weights among them, and of gradients and momentum. The forward pass runs on torch's
    meta device, where nothing is computed.

    Args:
        n_classes: of the data set.
        precision: fp32, bf16 or fp16.
        world_size: ranks that share the batch.
    """
    net = network.build(n_classes).to('meta')
    if world_size > 1:  # the sync batch norm of the real network takes a single image
        for module in net.modules():
            if isinstance(module, ASPP):
                module.pool.eval()
    saved = {}  # storage -> bytes

    def count(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    n_images = settings.BATCH_SIZE // (world_size * settings.ACCUMULATE)
    h, w = loader.crop_size()
    images = torch.zeros(n_images, 3, h, w, device='meta')
    labels = torch.zeros(n_images, h, w, dtype=torch.uint8, device='meta')
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        net(images, labels)
    activations = sum(saved.values())
    if precision != 'fp32':
        activations /= 2
    n_weights = sum(p.numel() for p in net.parameters())
    return (activations + 8 * n_weights) / 1e9
