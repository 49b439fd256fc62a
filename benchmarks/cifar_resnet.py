"""CIFAR-10 residual networks (He et al. 2016, section 4.2) as a transformers model, with its architecture tables.

Importing this file registers the model and both tables from outside the package. It is the worked example of "Add an
architecture" in CONTRIBUTING for convolutions. A fused model has fewer layers, or layers that share their kernels. It
loads in every program that imports this file.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_layerfuse import ConvArchitecture, ConvGraphArchitecture, Convolutions, Skip, Unit, register_architecture


class CifarResNetConfig(PreTrainedConfig):
    """Width and stride of each layer of two convolutions; the first layer reads `widths[0]` channels."""

    model_type = "cifar_resnet"
    image_size: int = 32
    num_hidden_layers: int = 27
    widths: list[int] | None = None
    strides: list[int] | None = None

    def __post_init__(self, **kwargs) -> None:
        count = self.num_hidden_layers
        self.widths = self.widths or [16 << 3 * i // count for i in range(count)]
        before = [self.widths[0], *self.widths]
        self.strides = self.strides or [1 + (a != b) for a, b in zip(before, self.widths, strict=False)]
        super().__post_init__(**kwargs)


class Shortcut(nn.Module):
    """A shortcut without parameters: it skips pixels and pads channels with zeros."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before, self.behind = stride, (width - channels) // 2, (width - channels + 1) // 2

    def forward(self, hidden: Tensor) -> Tensor:
        return F.pad(hidden[:, :, :: self.stride, :: self.stride], (0,) * 4 + (self.before, self.behind))


class CifarResNetLayer(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 and channels == width else Shortcut(channels, width, stride)
        self.act = nn.ReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        added = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(hidden)))))
        return self.act(self.shortcut(hidden) + added)


class CifarResNetForImageClassification(PreTrainedModel):
    config_class = CifarResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        widths = [config.widths[0], *config.widths]
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.act = nn.ReLU()
        self.layers = nn.ModuleList(map(CifarResNetLayer, widths, config.widths, config.strides))
        self.classifier = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        hidden = self.act(self.bn(self.conv(pixel_values)))
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.classifier(hidden.mean((2, 3)))
        return ImageClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


AutoConfig.register("cifar_resnet", CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)


@register_architecture
class CifarResNetArchitecture(ConvArchitecture, ConvGraphArchitecture):
    """Architecture table for fusing layers and for merging convolutions."""

    model_type = "cifar_resnet"
    layers = "layers"
    conv = {"in": "conv1", "in_norm": "bn1", "out": "conv2", "norm": "bn2", "act": "act"}
    per_layer_config = ("widths", "strides")

    def convolutions(self, model: PreTrainedModel) -> Convolutions:
        units, skips = [Unit("conv", "bn", "act")], []
        for i in range(len(model.layers)):
            path, branch = f"layers.{i}", ("conv1", "bn1", "act1", "conv2", "bn2")
            names = [f"{path}.{name}" for name in (*branch, "act")]
            units += [Unit(*names[:3]), Unit(*names[3:])]
            skips.append(Skip(len(units) - 3, len(units) - 1, path, branch, "shortcut", "act"))
        return Convolutions(units, skips)

    def activation(self, config: PreTrainedConfig) -> nn.Module:
        return nn.ReLU()


def cifar10(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32), normalised as for the training of the checkpoints, and their labels (n,).

    Args:
        folder: Folder with lossless sheets `{split}_*.webp` of 32 x 32 images, row by row, and `{split}_labels.npy`.
        split: Name of the split, `train` or `test`.
    """
    images = []
    for path in sorted(folder.glob(f"{split}_*.webp")):
        sheet = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        images.append(sheet.unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).transpose(1, 2).flatten(0, 1))
    pixels = torch.cat(images).permute(0, 3, 1, 2) / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)[: len(pixels)]
    return (pixels - mean) / deviation, torch.from_numpy(labels.astype(np.int64))


def published(path: Path) -> CifarResNetForImageClassification:
    """A checkpoint of https://github.com/akamaster/pytorch_resnet_cifar10, converted to safetensors."""
    state = {}
    for name, tensor in load_file(path).items():
        stage, _, rest = name.partition(".")
        if stage.startswith("layer"):
            state[(int(stage[5:]), *rest.split(".", 1))] = tensor
        else:
            state[name.replace("conv1", "conv").replace("bn1", "bn").replace("linear", "classifier")] = tensor
    stages = sorted({name[:2] for name in state if isinstance(name, tuple)}, key=lambda name: (name[0], int(name[1])))
    places = {stage: place for place, stage in enumerate(stages)}
    named = {
        f"layers.{places[name[:2]]}.{name[2]}" if isinstance(name, tuple) else name: tensor
        for name, tensor in state.items()
    }
    model = CifarResNetForImageClassification(CifarResNetConfig(num_hidden_layers=len(stages), num_labels=10))
    missing = model.load_state_dict(named, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return model.float().eval()
