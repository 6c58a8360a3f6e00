"""Class probabilities of one image: predict first, score or draw second.

    from inference import predict
    mask = predict(net, image).argmax(0)    # net: a Segmenter in evaluation mode
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold(net: nn.Module, precision: str = 'fp32') -> nn.Module:
    """Fold batch norms into the convolutions before them, for inference only.

    Args:
        net: in evaluation mode; is changed in place and cannot be trained afterwards.
            In each of its modules a batch norm belongs to the convolution that is
            registered right before it, on its own or as the last of a sequence.
        precision: bf16 and fp16 also keep the convolutions' weights so, which spares
            autocast the casting in every call.

    Returns:
        The network.
    """
    for module in list(net.modules()):
        before = None  # (parent, name) of the convolution right before
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None:
                parent, conv = before
                setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), child))
                setattr(module, name, nn.Identity())
            before = (module, name)
            if isinstance(child, nn.Sequential) and len(child):
                before = (child, list(child._modules)[-1])
            if not isinstance(getattr(*before), nn.Conv2d):
                before = None
    if precision != 'fp32':
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(torch.bfloat16 if precision == 'bf16' else torch.float16)
    return net


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
