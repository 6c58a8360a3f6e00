"""Class probabilities of one image: predict first, score or draw second.

    from inference import predict
    mask = predict(net, image).argmax(0)    # net: a Segmenter in evaluation mode
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padded_size(size: int, stride: int) -> int:
    """Return the least multiple of the stride plus 1 that is not below a size.

    With such sizes and aligned corners a feature lies on every stride-th pixel exactly.
    """
    return -(-(size - 1) // stride) * stride + 1


@torch.inference_mode()
def predict_logits(net: nn.Module, image: Tensor, raw: nn.Module | None = None
                   ) -> Tensor:
    """Return the logits of one image at its own size (FACTS: single scale).

    The image is padded right and bottom with the mean, which is 0 after normalising, to
    a multiple of the output stride plus 1; the padding is cut off again.

    Args:
        net: a Segmenter in evaluation mode, compiled perhaps.
        image: (3, h, w) uint8, on any device.
        raw: the Segmenter itself where `net` is wrapped.

    Returns:
        (classes, h, w) float32 on the network's device.
    """
    raw = raw or net
    h, w = image.shape[1:]
    x = raw.normalise(image[None].to(raw.mean.device, non_blocking=True))
    x = F.pad(x, (0, padded_size(w, raw.stride) - w, 0, padded_size(h, raw.stride) - h))
    return net(x)[0, :, :h, :w]


def predict(net: nn.Module, image: Tensor, raw: nn.Module | None = None) -> Tensor:
    """Return the class probabilities of one image: see predict_logits.

    Returns:
        (classes, h, w) float32, sums to 1 over the classes.
    """
    return predict_logits(net, image, raw).softmax(0)
