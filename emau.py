"""The EM attention unit; needs torch alone, so this file can be copied on its own.

    from emau import EMAU
    y = EMAU(512, bases=64, stages=3)(x)    # (b, 512, h, w) -> (b, 512, h, w)

Letters are the paper's: x the features, z the responsibilities, mu the bases; n = h*w
pixels, k bases, c channels, T stages.
"""
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # added to both denominators, as in the released code


def at_least_float32(x: Tensor) -> Tensor:
    """Return half and bfloat16 tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def disable_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switch autocast off, where it is on; an exported program has no such step."""
    if (torch.amp.is_autocast_available(device_type)
            and torch.is_autocast_enabled(device_type)):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def is_recomputing() -> bool:
    """Return whether this forward is part of a backward pass.

    Activation checkpointing computes a forward again there.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


CHOICES = {'kernel': ('exp_dot', 'dot', 'euclidean'),
           'norm': ('l2', 'layer_norm', 'none'),
           'update': ('moving_average', 'back_propagation', 'never'),
           'gradient': ('none', 'last', 'full'),
           'conv1': ('auto', 'fixed', 'trained', 'absent')}


def check_choices(**values: str) -> None:
    """Raise an error for a value that CHOICES does not have."""
    for name, value in values.items():
        if value not in CHOICES[name]:
            raise ValueError(f'EMAU: {name}={value!r} is none of '
                             f'{", ".join(CHOICES[name])}')


def check_stages(bases: int, stages: int, eval_stages: int | tuple[int, ...]) -> None:
    """Raise an error for numbers that are too small."""
    several = eval_stages if isinstance(eval_stages, tuple) else (eval_stages or 1,)
    if stages < 1 or bases < 1 or min(several, default=0) < 1:
        raise ValueError(f'EMAU: {bases} bases, {stages} stages and {eval_stages} '
                         'at evaluation: bases and stages must be at least 1, '
                         'evaluation stages 0 (the same) or more')


def check_pairs(kernel: str, update: str, gradient: str, conv1: str, lambd: float
                ) -> None:
    """Raise an error for choices that do not go together."""
    if update == 'back_propagation' and gradient != 'full':
        raise ValueError(
            'EMAU: bases updated by back_propagation need a gradient through all '
            f"iterations, but gradient={gradient!r}: set it to 'full'")
    if conv1 == 'trained' and gradient == 'none':
        raise ValueError("EMAU: conv1='trained', but gradient='none' lets nothing "
                         "reach it: set the gradient to 'last' or 'full', or conv1 "
                         "to 'fixed'")
    if kernel == 'dot' and lambd != 1:
        raise ValueError(f'EMAU: lambda={lambd} has no effect on the dot kernel, '
                         'it cancels in the normalisation: leave it at 1')


class EMAU(nn.Module):
    """Expectation-Maximization Attention Unit (paper, sections 4 and 5; figure 2).

    conv1, T iterations of A_E and A_M from the kept bases, A_R, ReLU, conv2 with batch
    norm, the residual, ReLU. The unit owns its bases `mu` and their update.
    The EM arithmetic is done in float32 (or float64) whatever the features' type, and
    the bases stay float32 in a network that is cast to half.

    Args:
        channels: of the input and of the output, C.
        bases: K.
        stages: T while training, at least 1.
        eval_stages: T at evaluation; 0 is `stages`. Several, as (1, 3, 8), give an
            output for each of them, one after another along the batch.
        lambd: lambda of eq. 12. Infinity in the limit makes A_E one-hot (K-means).
        kernel: of eq. 11. 'exp_dot' exp(lambda a.b), the paper's; 'dot' max(a.b, 0);
            'euclidean' exp(-lambda |a - b|^2), the softmax of the negative squared
            distance, which is the RBF kernel with sigma^2 = 1 / lambda.
        norm: of each basis after A_M (section 5.3): 'l2', 'layer_norm' or 'none'.
        update: of the kept bases (section 5.2, figure 3): 'moving_average' (eq. 15),
            'back_propagation' (the bases are a parameter) or 'never'.
        gradient: through the iterations: 'none', 'last' (only the last one) or 'full'.
        momentum: alpha of eq. 15, the share of the old bases.
        renorm: normalise the batch mean of eq. 15 before it is averaged in.
        conv1: 'fixed' (random), 'trained', 'absent', or 'auto': trained where the
            gradient reaches it.
        bn_momentum: of conv2's batch norm.
        auto_update: move the bases in each training forward. With False the training
            loop calls `update_bases` after the whole batch. When activation
            checkpointing computes the last forward again, it starts from the same
            bases, and they do not move again.

    Paper: conv1 is a learned convolution. Here: with gradient='none', the default, it
    keeps its random weights, because the released code iterates under no_grad and so
    never trains it.

    Raises:
        ValueError: for an unknown choice, or a pair that cannot train.
    """

    def __init__(self, channels: int, bases: int = 64, stages: int = 3,
                 eval_stages: int | tuple[int, ...] = 0, lambd: float = 1.0,
                 kernel: str = 'exp_dot', norm: str = 'l2',
                 update: str = 'moving_average', gradient: str = 'none',
                 momentum: float = 0.9, renorm: bool = False, conv1: str = 'auto',
                 bn_momentum: float = 0.1, auto_update: bool = True):
        super().__init__()
        check_choices(kernel=kernel, norm=norm, update=update, gradient=gradient,
                      conv1=conv1)
        check_stages(bases, stages, eval_stages)
        check_pairs(kernel, update, gradient, conv1, lambd)
        self.channels = channels
        self.stages, self.eval_stages = stages, eval_stages or stages
        self.lambd, self.kernel, self.norm = lambd, kernel, norm
        self.update, self.gradient, self.momentum = update, gradient, momentum
        self.renorm, self.auto_update = renorm, auto_update

        self.conv1 = None if conv1 == 'absent' else nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False),
                                   nn.BatchNorm2d(channels, momentum=bn_momentum))
        for m in (self.conv1, self.conv2[0]):
            if m is not None:
                nn.init.normal_(m.weight, 0, math.sqrt(2 / channels))
        if self.conv1 is not None:
            self.conv1.requires_grad_(conv1 == 'trained' or
                                      conv1 == 'auto' and gradient != 'none')

        mu = self.normalise(torch.randn(1, channels, bases) * math.sqrt(2 / bases))
        if update == 'back_propagation':
            self.mu = nn.Parameter(mu)                             # (1, c, k)
        else:
            self.register_buffer('mu', mu)
        # The bases before the last update, for activation checkpointing.
        self.register_buffer('old_mu', mu.detach().clone(), False)
        # What eq. 15 averages: the sum of mu^(T) over images, and their number. And the
        # share of the pixels that each basis is responsible for: summed likewise, and
        # as it was in the last batch.
        self.register_buffer('mu_sum', torch.zeros(1, channels, bases), False)
        self.register_buffer('n_images', torch.zeros(1), False)
        self.register_buffer('usage_sum', torch.zeros(bases), False)
        self.register_buffer('usage', torch.full((bases,), 1 / bases), False)

    def _apply(self, fn, *args, **kwargs):
        """Cast and move as any module does, but keep the bases at least float32."""
        names = ('mu', 'old_mu', 'mu_sum', 'n_images', 'usage_sum', 'usage')
        exact = [getattr(self, name).detach().clone() for name in names]
        super()._apply(fn, *args, **kwargs)
        for name, tensor in zip(names, exact, strict=True):
            new = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16):
                new.data = tensor.to(new.device)
        return self

    def normalise(self, mu: Tensor) -> Tensor:
        """Normalise each basis over its channels (section 5.3).

        Args:
            mu: (b, c, k).
        """
        if self.norm == 'l2':
            return mu / (EPS + mu.norm(dim=1, keepdim=True))
        if self.norm == 'layer_norm':
            # not mu.shape[1], which ONNX does not know beforehand
            return F.layer_norm(mu.transpose(1, 2), (self.channels,)).transpose(1, 2)
        return mu

    def e_step(self, x: Tensor, mu: Tensor) -> Tensor:
        """A_E, eq. 11 and 12: the responsibility of each basis for each pixel.

        Args:
            x: (b, n, c) features.
            mu: (b, c, k) bases.

        Returns:
            z: (b, n, k), not negative, sums to 1 over the bases.
        """
        if self.kernel == 'dot':
            z = (x @ mu).clamp(min=0) + EPS  # a pixel far from all is shared evenly
            return z / z.sum(dim=2, keepdim=True)
        scaled = self.lambd * mu  # lambda here: c * k numbers, not n * k
        if self.kernel == 'euclidean':
            # |x - mu|^2 less |x|^2, which is the same for all bases and cancels
            return F.softmax(x @ (2 * scaled) - (scaled * mu).sum(1, True), dim=2)
        return F.softmax(x @ scaled, dim=2)

    def m_step(self, x: Tensor, z: Tensor) -> Tensor:
        """A_M, eq. 13: the bases that the responsibilities make, normalised.

        Args:
            x: (b, n, c) features.
            z: (b, n, k) responsibilities.

        Returns:
            mu: (b, c, k).
        """
        # divided after the product: c * k numbers, not n * k
        mu = x.transpose(1, 2) @ z / (EPS + z.sum(dim=1, keepdim=True))
        return self.normalise(mu)

    def reconstruct(self, z: Tensor, mu: Tensor) -> Tensor:
        """A_R, eq. 14: each pixel as the mixture of bases responsible for it.

        Args:
            z: (b, n, k) responsibilities.
            mu: (b, c, k) bases.

        Returns:
            (b, n, c).
        """
        return z @ mu.transpose(1, 2)

    def iterate(self, x: Tensor, stages: int) -> tuple[list[Tensor], list[Tensor]]:
        """Run T times A_E and A_M, each image from the kept bases.

        Args:
            x: (b, n, c) features.
            stages: T.

        Returns:
            (mus, zs): the bases (b, c, k) and the responsibilities (b, n, k) of each
            iteration.
        """
        mu = self.mu
        if self.update == 'moving_average':
            has_moved = self.training and self.auto_update and is_recomputing()
            # A copy: the update moves the kept bases before the backward pass.
            mu = (self.old_mu if has_moved else mu).clone()
        mu = mu.expand(x.shape[0], -1, -1)                         # (b, c, k)
        mus, zs = [], []
        for t in range(1, stages + 1):
            is_last = self.gradient == 'last' and t == stages
            has_grad = torch.is_grad_enabled() and (self.gradient == 'full' or is_last)
            with torch.set_grad_enabled(has_grad):
                z = self.e_step(x, mu)                             # (b, n, k)
                mu = self.m_step(x, z)                             # (b, c, k)
            mus.append(mu)
            zs.append(z)
        return mus, zs

    def output_stages(self) -> tuple[int, ...]:
        """Return the T of each output of a forward: several only at evaluation."""
        stages = self.stages if self.training else self.eval_stages
        return stages if isinstance(stages, tuple) else (stages,)

    def forward(self, x: Tensor, return_z: bool = False
                ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Apply the unit.

        Args:
            x: (b, c, h, w) features.
            return_z: return the responsibilities too.

        Returns:
            (b, c, h, w), not negative; with `return_z` a pair of it and a list of T
            tensors (b, n, k), the responsibilities of each iteration, the pixels in
            reading order: z.unflatten(1, (h, w)) is a map.
        """
        identity, size = x, x.shape[2:]
        stages = self.output_stages()
        has_grad = torch.is_grad_enabled() and self.gradient != 'none'
        with torch.set_grad_enabled(has_grad):
            if self.conv1 is not None:
                x = self.conv1(x)
            x = x.flatten(2).transpose(1, 2)                       # (b, n, c)
            with disable_autocast(x.device.type):
                x = at_least_float32(x)
                mus, zs = self.iterate(x, max(stages))
                y = torch.cat([self.reconstruct(zs[t - 1], mus[t - 1])
                               for t in stages])                   # (b, n, c)
        if self.training and not is_recomputing():
            if self.update == 'moving_average':
                self.mu_sum += mus[-1].detach().sum(0, keepdim=True)
            self.usage_sum += zs[-1].detach().mean(1).sum(0)
            self.n_images += len(x)
            if self.auto_update:
                self.update_bases()
        if len(stages) > 1:
            identity = identity.repeat(len(stages), 1, 1, 1)
        y = y.to(identity.dtype).transpose(1, 2).unflatten(2, size)  # (b, c, h, w)
        y = F.relu(self.conv2(F.relu(y)).add_(identity))
        return (y, zs) if return_z else y

    @torch.no_grad()
    def update_bases(self, is_finite: Tensor | bool = True) -> None:
        """Move the kept bases towards the mean of mu^(T), eq. 15.

        The mean is over all images since the last call, of all ranks where
        torch.distributed runs; so every rank ends with the same bases. Where they are
        not moved by averaging only `usage` is brought up to date.

        Args:
            is_finite: where this is False the bases stay as they were.
        """
        total = torch.cat([self.mu_sum.flatten(), self.usage_sum, self.n_images])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        is_finite = (total[-1] > 0) & is_finite
        mean, usage = (total[:-1] / total[-1]).split([self.mu.numel(), len(self.usage)])
        self.usage.copy_(torch.where(is_finite, usage, self.usage))
        if self.update == 'moving_average':
            self.old_mu.copy_(self.mu)
            mean = mean.view_as(self.mu)                           # (1, c, k)
            if self.renorm:
                mean = self.normalise(mean)
            mu = self.momentum * self.mu + (1 - self.momentum) * mean
            self.mu.copy_(torch.where(is_finite, mu, self.mu))
        for tensor in (self.mu_sum, self.usage_sum, self.n_images):
            tensor.zero_()
