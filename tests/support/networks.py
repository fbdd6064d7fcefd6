"""Small networks, one for each way in which people's code moves units around; every one takes (N, 1, 8, 8)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import stochastic_depth

NETWORKS: dict[str, Callable[[], nn.Module]] = {}
Step = Callable[..., torch.Tensor]


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run: Step, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


class Head(nn.Module):
    """Mean over the places, then a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


def conv(ins: int, outs: int, kernel: int = 3, **more: object) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **more)


def between(name: str, step: Step, ins: int = 16, outs: int = 16, **layers: Callable[[], nn.Module]) -> None:
    """Register: convolution `a`, then a step, then convolution `b` and the head."""

    def make() -> nn.Module:
        made = {k: v() for k, v in layers.items()}
        return Net(
            lambda s, x: s.h(F.relu(s.b(step(s, s.a(x))))), {"a": conv(1, ins), "b": conv(outs, 16), "h": Head(16), **made}
        )

    NETWORKS[name] = make


def whole(name: str, run: Step, **layers: Callable[[], nn.Module]) -> None:
    """Register a network given by one function."""
    NETWORKS[name] = lambda: Net(run, {k: v() for k, v in layers.items()})


class OwnConv2d(nn.Conv2d):
    """A convolution of the user's own class."""


class OwnLinear(nn.Linear):
    """A linear layer of the user's own class."""


class OwnBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm of the user's own class."""


class BatchNormAct(nn.BatchNorm2d):
    """BatchNorm by its function, and an activation, as in timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        training = self.training
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps)
        return F.relu(y, inplace=True)


def asserting(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.c(x)
    torch._assert(y.shape[-2:] == x.shape[-2:], "a branch keeps the size")
    return x + y


between("plain", lambda s, x: F.relu(x))
between("batch_norm", lambda s, x: F.relu(s.n(x)), n=lambda: nn.BatchNorm2d(16))
between("batch_norm_without_affine", lambda s, x: F.relu(s.n(x)), n=lambda: nn.BatchNorm2d(16, affine=False))
between("batch_norm_without_statistics", lambda s, x: F.relu(s.n(x)), n=lambda: nn.BatchNorm2d(16, track_running_stats=False))
between("batch_norm_as_a_function", lambda s, x: s.n(x), n=lambda: BatchNormAct(16))
between(
    "batch_norm_as_a_function_without_bias_before",
    lambda s, x: s.n(s.c(F.relu(x))),
    c=lambda: conv(16, 16, bias=False),
    n=lambda: BatchNormAct(16),
)
between("synchronised_batch_norm", lambda s, x: F.relu(s.n(x)), n=lambda: nn.SyncBatchNorm(16))
between("prelu", lambda s, x: s.p(x), p=lambda: nn.PReLU(16))
between("prelu_of_one_slope", lambda s, x: s.p(x), p=nn.PReLU)
between("transposed_convolution", lambda s, x: F.relu(s.t(F.relu(x))), t=lambda: nn.ConvTranspose2d(16, 16, 2, stride=2))
between(
    "grouped_transposed",
    lambda s, x: F.relu(s.t(F.relu(x))),
    t=lambda: nn.ConvTranspose2d(16, 32, 2, stride=2, groups=4),
    outs=32,
)
between("pixel_shuffle", lambda s, x: F.pixel_shuffle(F.relu(x), 2), ins=32, outs=8)
between("pixel_unshuffle", lambda s, x: F.pixel_unshuffle(F.relu(x), 2), outs=64)
between("chunk_as_gate", lambda s, x: (lambda t: t[0] * torch.sigmoid(t[1]))(torch.chunk(x, 2, 1)), ins=32)
between("glu", lambda s, x: F.glu(x, 1), ins=32)
between("split_with_sizes", lambda s, x: torch.cat([t.relu() for t in torch.split(x, [10, 6], 1)], 1))
between("every_second_channel", lambda s, x: F.relu(x)[:, ::2], ins=32)
between("first_channels", lambda s, x: F.relu(x)[:, : x.shape[1] // 2], ins=32)
between("grouped", lambda s, x: F.relu(s.g(F.relu(x))), g=lambda: conv(16, 16, groups=4))
between(
    "grouped_twice", lambda s, x: F.relu(s.k(F.relu(s.g(x)))), g=lambda: conv(16, 16, groups=4), k=lambda: conv(16, 16, groups=8)
)
between("depthwise_with_multiplier", lambda s, x: F.relu(s.g(F.relu(x))), outs=32, g=lambda: conv(16, 32, groups=16))
between("one_channel", lambda s, x: F.relu(s.d(s.c(x))), c=lambda: conv(16, 1), d=lambda: conv(1, 16))
between("concatenation", lambda s, x: torch.cat(tensors=(F.relu(x), F.relu(s.c(x))), dim=-3), outs=32, c=lambda: conv(16, 16))
between(
    "norm_after_concatenation",
    lambda s, x: s.n(torch.cat((x, s.c(x)), 1)),
    outs=32,
    c=lambda: conv(16, 16),
    n=lambda: nn.BatchNorm2d(32),
)
between("group_norm", lambda s, x: F.relu(s.n(x)), n=lambda: nn.GroupNorm(4, 16))
between("group_norm_of_one_group", lambda s, x: F.relu(s.n(x)), n=lambda: nn.GroupNorm(1, 16))
between("instance_norm", lambda s, x: F.relu(s.n(x)), n=lambda: nn.InstanceNorm2d(16, affine=True))
between(
    "squeeze_excite",
    lambda s, x: x * torch.sigmoid(s.e(F.relu(s.r(F.adaptive_avg_pool2d(x, 1))))),
    r=lambda: nn.Conv2d(16, 8, 1),
    e=lambda: nn.Conv2d(8, 16, 1),
)
between(
    "squeeze_excite_linear",
    lambda s, x: x * torch.sigmoid(s.e(F.relu(s.r(x.mean((2, 3))))))[:, :, None, None],
    r=lambda: nn.Linear(16, 8),
    e=lambda: nn.Linear(8, 16),
)
between(
    "squeeze_excite_view",
    lambda s, x: x * torch.sigmoid(s.e(F.relu(s.r(x.mean((2, 3)))))).view(-1, 16, 1, 1),
    r=lambda: nn.Linear(16, 8),
    e=lambda: nn.Linear(8, 16),
)
between(
    "spatial_attention",
    lambda s, x: x * torch.sigmoid(s.e(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))),
    e=lambda: conv(2, 1),
)
between(
    "channel_shuffle_by_view",
    lambda s, x: x.view(x.shape[0], 2, 16, 8, 8).transpose(1, 2).reshape(x.shape[0], 32, 8, 8),
    ins=32,
    outs=32,
)
between("channel_shuffle", lambda s, x: s.q(F.relu(x)), ins=32, outs=32, q=lambda: nn.ChannelShuffle(4))
between("softmax_over_channels", lambda s, x: F.softmax(x, 1))
between("local_response_norm", lambda s, x: s.q(F.relu(x)), q=lambda: nn.LocalResponseNorm(5))
between("where", lambda s, x: torch.where(x > 0, x, x * 0.1))
between("constant_padding", lambda s, x: s.p(F.relu(x)), p=lambda: nn.ConstantPad2d(1, 0.7))
between("padded_channels", lambda s, x: F.pad(F.relu(x), (0, 0, 0, 0, 4, 4)), outs=24)
between("scaled_and_shifted", lambda s, x: 1 - torch.sigmoid(F.relu(x) * 2 + 1) / 2)
between("residual_with_dropout", lambda s, x: x + s.d(s.c(F.relu(x))), c=lambda: conv(16, 16), d=lambda: nn.Dropout2d(0.3))
between("inplace_before_addition", lambda s, x: x + s.c(s.r(x)), c=lambda: conv(16, 16), r=lambda: nn.ReLU(inplace=True))
between("residual_in_parts", lambda s, x: x + torch.cat((s.c(x), s.d(x)), 1), c=lambda: conv(16, 8), d=lambda: conv(16, 8))
between(
    "residual_with_cheap_features",
    lambda s, x: x + torch.cat((y := s.c(x), s.d(y)), 1),
    c=lambda: conv(16, 8),
    d=lambda: conv(8, 8),
)
between("asserted_residual", asserting, c=lambda: conv(16, 16))
between("unused_layer", lambda s, x: F.relu(x), z=lambda: conv(3, 9))
between("answer_no_one_reads", lambda s, x: (s.z(x), F.relu(x))[1], z=lambda: conv(16, 9))
between(
    "linear_on_channels_last",
    lambda s, x: s.p(F.gelu(s.q(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
    q=lambda: nn.Linear(16, 32),
    p=lambda: nn.Linear(32, 16),
)
between("upsampled_sum", lambda s, x: x + F.interpolate(s.c(F.max_pool2d(x, 2)), size=x.shape[-2:]), c=lambda: conv(16, 16))
between("token_mixing", lambda s, x: x + s.t(x.reshape(x.shape[0] * x.shape[1], -1)).view(x.shape), t=lambda: nn.Linear(64, 64))
between("weight_norm_parametrised", lambda s, x: F.relu(s.c(x)), c=lambda: parametrizations.weight_norm(conv(16, 16)))
between("spectral_norm_parametrised", lambda s, x: F.relu(s.c(x)), c=lambda: parametrizations.spectral_norm(conv(16, 16)))
between(
    "expand_as_gate", lambda s, x: x * s.e(F.adaptive_avg_pool2d(x, 1)).sigmoid().expand_as(x), e=lambda: nn.Conv2d(16, 16, 1)
)
between(
    "eca_gate",
    lambda s, x: x * s.e(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None],
    e=lambda: nn.Conv1d(1, 1, 3, padding=1),
)


class GlobalResponseNorm(nn.Module):
    """GRN as in ConvNeXt V2; fused: weight and bias in one addcmul."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.weight, self.bias = (nn.Parameter(torch.randn(1, 16, 1, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        share = size / (size.mean(dim=1, keepdim=True) + 1e-6)
        if self.fused:
            return x + torch.addcmul(self.bias, self.weight, x * share)
        return self.weight * (x * share) + self.bias + x


between("response_norm", lambda s, x: s.q(x), q=lambda: GlobalResponseNorm(False))
between("response_norm_fused", lambda s, x: s.q(x), q=lambda: GlobalResponseNorm(True))
between("scaled_sum", lambda s, x: torch.add(s.c(x), x, alpha=2), c=lambda: conv(16, 16))
between("reflected", lambda s, x: F.relu(s.c(x)), c=lambda: conv(16, 16, padding_mode="reflect"))


def pruning_mask() -> nn.Module:
    net = NETWORKS["plain"]()
    prune.l1_unstructured(net.b, "weight", 0.5)
    return net


def old_weight_norm() -> nn.Module:
    net = NETWORKS["plain"]()
    nn.utils.weight_norm(net.b)  # type: ignore[no-untyped-call]
    return net


NETWORKS["pruning_mask"] = pruning_mask
NETWORKS["old_weight_norm"] = old_weight_norm

whole(
    "own_classes",
    lambda s, x: s.f(F.relu(s.b(F.relu(s.n(s.a(x))))).mean((2, 3))),
    a=lambda: OwnConv2d(1, 16, 3, padding=1),
    n=lambda: OwnBatchNorm2d(16),
    b=lambda: OwnConv2d(16, 16, 3, padding=1),
    f=lambda: OwnLinear(16, 10),
)
whole(
    "flatten", lambda s, x: s.f(F.max_pool2d(F.relu(s.a(x)), 2).flatten(1)), a=lambda: conv(1, 16), f=lambda: nn.Linear(256, 10)
)
whole(
    "flatten_by_keyword",
    lambda s, x: s.f(torch.flatten(F.max_pool2d(F.relu(s.a(x)), 2), start_dim=1)),
    a=lambda: conv(1, 16),
    f=lambda: nn.Linear(256, 10),
)
whole(
    "stochastic_depth",
    lambda s, x: s.h(F.relu((x := F.relu(s.a(x))) + stochastic_depth(s.b(x), 0.5, "row", training=s.training))),
    a=lambda: conv(1, 16),
    b=lambda: conv(16, 16),
    h=lambda: Head(16),
)
whole(
    "view_of_a_literal",
    lambda s, x: s.f(F.max_pool2d(F.relu(s.a(x)), 2).view(-1, 256)),
    a=lambda: conv(1, 16),
    f=lambda: nn.Linear(256, 10),
)
whole(
    "squeeze",
    lambda s, x: s.f(F.adaptive_avg_pool2d(F.relu(s.a(x)), 1).squeeze(-1).squeeze(-1)),
    a=lambda: conv(1, 16),
    f=lambda: nn.Linear(16, 10),
)
whole(
    "two_pools",
    lambda s, x: s.f(torch.cat([F.adaptive_avg_pool2d(x := s.a(x), 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1)),
    a=lambda: conv(1, 16),
    f=lambda: nn.Linear(32, 10),
)
whole(
    "batch_norm_on_features",
    lambda s, x: s.f(s.n(F.relu(s.a(x)).flatten(1))),
    a=lambda: conv(1, 16),
    n=lambda: nn.BatchNorm1d(1024),
    f=lambda: nn.Linear(1024, 10),
)
whole(
    "batch_norm_on_a_sequence",
    lambda s, x: s.f(s.n(F.relu(s.a(x)).flatten(2)).mean(2)),
    a=lambda: conv(1, 16),
    n=lambda: nn.BatchNorm1d(16),
    f=lambda: nn.Linear(16, 10),
)
whole("softmax_at_the_end", lambda s, x: F.softmax(s.h(F.relu(s.a(x))), 1), a=lambda: conv(1, 16), h=lambda: Head(16))
whole(
    "focus", lambda s, x: s.h(s.a(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1))), a=lambda: conv(2, 16), h=lambda: Head(16)
)
whole(
    "audio",
    lambda s, x: s.f(F.relu(s.n(s.a(x.flatten(2)))).mean(-1)),
    a=lambda: nn.Conv1d(1, 16, 9),
    n=lambda: nn.BatchNorm1d(16),
    f=lambda: nn.Linear(16, 10),
)
whole(
    "weights_used_twice",
    lambda s, x: s.h(s.b(F.relu(s.b(F.relu(s.a(x)))))),
    a=lambda: conv(1, 16),
    b=lambda: conv(16, 16),
    h=lambda: Head(16),
)
