"""Networks to distil with: a body that computes features, and a linear head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn

from bilevel.data._seeding import mixed
from bilevel.modules import FunctionalModule, functional
from bilevel.status import InvalidProblem

Parameters: TypeAlias = dict[str, Tensor]
Norm: TypeAlias = Literal["instance", "none"]
Activation: TypeAlias = Literal["relu", "softplus", "tanh"]
SHARPNESS = 60.0
"""Of the softplus that stands for the ReLU where second derivatives are wanted."""


@dataclass(frozen=True, eq=False)
class Network:
    """An architecture without weights: `logits = features @ weight^T + bias`, with features from a body.

    Weights are dicts: those of the body under `body.*`, and `head.weight [classes, width]`, `head.bias [classes]`.

    Args:
        body: maps images `[b, *shape]` to features `[b, width]`; its values are not used, only its structure.
        shape: of one image.
        classes: C >= 2.
        head_scale: > 0, of the head's fresh weights. What a fresh network says of real images is noise that training
            on ten images cannot take back, as it moves ten directions only; a small head says little.

    Raises:
        InvalidProblem: the body does not map such images to vectors, or a number is out of its range.
    """

    body: nn.Module
    shape: tuple[int, ...]
    classes: int = 10
    head_scale: float = 0.1

    def __post_init__(self) -> None:
        if not self.head_scale > 0:
            raise InvalidProblem(f"Network(head_scale=...) must be > 0, got {self.head_scale}.")
        if self.classes < 2:
            raise InvalidProblem(f"Network(classes=...) must be at least 2, got {self.classes}.")
        found = self._shape_of_features()
        if len(found) != 2 or found[0] != 2:
            raise InvalidProblem(
                f"Network(body=...) must map images [b, {', '.join(map(str, self.shape))}] to features [b, width], got "
                f"{list(found)} for b = 2; end it with nn.Flatten()."
            )

    @cached_property
    def width(self) -> int:
        """Number of features."""
        return int(self._shape_of_features()[1])

    def start(self, seed: int, dtype: torch.dtype = torch.float32) -> Parameters:
        """Return fresh weights: normal, with variance 2 / inputs, or head_scale^2 / inputs; biases 0, norms 1."""
        generator = Generator().manual_seed(mixed("network", seed))
        shapes = {f"body.{name}": value.shape for name, value in self._body_parameters.items()}
        shapes |= {"head.weight": torch.Size((self.classes, self.width)), "head.bias": torch.Size((self.classes,))}
        weights: Parameters = {}
        for name, shape in shapes.items():
            if len(shape) < 2:
                weights[name] = torch.full(shape, float(name.endswith("weight")), dtype=dtype)
                continue
            gain = self.head_scale if name.startswith("head") else 2.0**0.5
            scale = gain / shape[1:].numel() ** 0.5
            weights[name] = scale * torch.randn(shape, generator=generator, dtype=dtype)
        return weights

    def features(self, y: Parameters, images: Tensor) -> Tensor:
        """Return the features `[b, width]` of images `[b, *shape]`."""
        if self._function is None:
            return self.body(images)  # type: ignore[no-any-return]
        found: Tensor = self._function({n[5:]: v for n, v in y.items() if n.startswith("body.")}, images)
        return found

    def logits(self, y: Parameters, images: Tensor) -> Tensor:
        """Return the logits `[b, classes]` of images `[b, *shape]`."""
        return self.features(y, images) @ y["head.weight"].T + y["head.bias"]

    def linearized(self, y: Parameters, direction: Parameters, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features at y, and their derivative along a direction of the body's weights.

        Args:
            y: the weights.
            direction: names `body.*`, shaped like y's.
            images: `[b, *shape]`.

        Returns:
            Both `[b, width]`, differentiable in the direction and in the images.
        """
        base = {name: y[name] for name in direction}
        with warnings.catch_warnings():
            # torch scripts its forward-mode formulas on first use, and deprecates that.
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            found: Any = torch.func.jvp(lambda w: self.features(w, images), (base,), (direction,))
        features, along = found
        return features, along

    def _shape_of_features(self) -> torch.Size:
        like = next(self.body.parameters(), torch.zeros(()))
        with torch.no_grad():
            found: Tensor = self.body(torch.zeros((2, *self.shape), dtype=like.dtype, device=like.device))
        return found.shape

    @cached_property
    def _body_parameters(self) -> dict[str, Tensor]:
        return dict(self.body.named_parameters())

    @cached_property
    def _function(self) -> FunctionalModule | None:
        return functional(self.body) if self._body_parameters else None


def conv_net(
    width: int = 32,
    *,
    depth: int = 3,
    norm: Norm = "instance",
    activation: Activation = "relu",
    shape: tuple[int, int, int] = (1, 28, 28),
    classes: int = 10,
) -> Network:
    """Return the network of the distillation papers: blocks of 3x3 convolution, norm, activation, 2x2 average pooling.

    Args:
        width: channels of every block, >= 1; the papers take 128.
        depth: blocks, >= 1; each halves the image, whose sides must not shrink to 0.
        norm: "instance", with learned scales, or "none".
        activation: "relu", "softplus" (sharp, for second derivatives) or "tanh".
        shape: channels, height and width of an image.
        classes: >= 2.

    Raises:
        InvalidProblem: an option is out of its range.

    Example:
        >>> network = conv_net(4, depth=2)
        >>> network.logits(network.start(0), torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    if width < 1 or depth < 1 or min(shape[1:]) < 2**depth:
        raise InvalidProblem(
            f"conv_net: width {width} and depth {depth} must be >= 1, and images {shape[1:]} at least 2^depth wide."
        )
    if norm not in get_args(Norm) or activation not in get_args(Activation):
        raise InvalidProblem(
            f"conv_net: norm must be one of {get_args(Norm)} and activation one of {get_args(Activation)}, got "
            f"{norm!r} and {activation!r}."
        )
    layers: list[nn.Module] = []
    for block in range(depth):
        layers.append(nn.Conv2d(shape[0] if block == 0 else width, width, 3, padding=1))
        if norm == "instance":
            layers.append(nn.InstanceNorm2d(width, affine=True))
        layers += [_ACTIVATIONS[activation](), nn.AvgPool2d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten()), shape, classes)


def mlp(
    *hidden: int,
    activation: Activation = "relu",
    shape: tuple[int, ...] = (1, 28, 28),
    classes: int = 10,
) -> Network:
    """Return a network of fully connected hidden layers; a linear model without any.

    Args:
        hidden: widths of the hidden layers, each >= 1.
        activation: as for `conv_net`.
        shape: of an image.
        classes: >= 2.

    Raises:
        InvalidProblem: an option is out of its range.

    Example:
        >>> mlp(16, shape=(1, 8, 8)).start(0)["body.1.weight"].shape
        torch.Size([16, 64])
    """
    if min(hidden, default=1) < 1 or activation not in get_args(Activation):
        raise InvalidProblem(
            f"mlp: hidden widths must be >= 1 and activation one of {get_args(Activation)}, got {hidden} and "
            f"{activation!r}."
        )
    sizes = [torch.Size(shape).numel(), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(before, after), _ACTIVATIONS[activation]()]
    return Network(nn.Sequential(*layers), shape, classes)


_ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "softplus": lambda: nn.Softplus(beta=SHARPNESS),
    "tanh": nn.Tanh,
}
