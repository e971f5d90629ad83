"""LoRA: several trainable roles on one frozen network (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

A `LoraBank` puts adapters into a denoiser's layers with peft. A `LoraRole` is one of them as a network of its own, which trains, averages,
shards and saves the adapter alone. With none selected the denoiser is bit for bit what it was: the teacher.

peft's own switches (`set_adapter`, `disable_adapters`) flip requires_grad, and a graph that was built before then silently yields no
gradients. Here all layers hold one list of names, and to select is to change its content. peft is imported when a bank is made and not before.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from models.denoiser import Denoiser, ScoreModel
from models.diffusers_conditional import DiffusersPromptUNet
from models.diffusers_unet import DiffusersUNet

PRESETS = {  # names that layers end in
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "dmd2": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
             "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),  # of its published SDXL LoRA
}
PARTS = ("lora_A", "lora_B")  # W x + scale B A x
CHECKPOINTED = (DiffusersUNet, DiffusersPromptUNet)  # networks that let a caller say how to checkpoint
WEIGHTS = "pytorch_lora_weights.safetensors"  # where diffusers' load_lora_weights looks for them


def layers_of(backbone: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear and convolution layers that end in one of the targets."""
    return [name for name, m in backbone.named_modules()
            if (isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.groups == 1) and f".{name}".endswith(tuple(f".{t}" for t in targets))]


def resolve(backbone: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Targets with presets opened up: of a preset what there is in this network, of others all. Raises ValueError for what names no layer."""
    found = [name for target in targets for name in PRESETS.get(target, (target,)) if target not in PRESETS or layers_of(backbone, (name,))]
    strange = next((name for name in found if not layers_of(backbone, (name,))), None)
    if strange or not found:
        raise ValueError(f"lora.targets {strange or ', '.join(targets)} names no nn.Linear or nn.Conv2d of its {type(backbone).__name__} (diffusers' "
                         "networks are made of them, EDM's and EDM2's of layers of their own)")
    return tuple(dict.fromkeys(found))


def check_network(backbone: nn.Module, targets: tuple[str, ...], checkpointing: bool) -> None:
    """Raises ValueError where a network cannot have such adapters."""
    resolve(backbone, targets)
    if checkpointing:
        _unet(backbone)


def _unet(backbone: nn.Module) -> nn.Module:
    if not isinstance(backbone, CHECKPOINTED):
        raise ValueError(f"lora.checkpointing is for UNets of diffusers, and its network is a {type(backbone).__name__}")
    return backbone.unet


class LoraBank:
    """Adapters by name on one frozen denoiser, at most one at work at a time.

    rank, alpha: an adapter adds alpha / rank B A to a weight; B starts at zero. targets: names that layers end in, or PRESETS. Adapters are
    float32 whatever the denoiser is, and differ between names. Do not call peft's or diffusers' adapter methods on the denoiser afterwards.
    """

    def __init__(self, denoiser: Denoiser, names: tuple[str, ...], rank: int, alpha: float, targets: tuple[str, ...] = ("dmd2",)):
        self.denoiser, self.selected = denoiser, []
        self.config = {"rank": rank, "alpha": alpha, "targets": list(resolve(denoiser.backbone, targets))}
        paths = layers_of(denoiser.backbone, tuple(self.config["targets"]))
        for name in names:
            self._inject(name)
        self.layers = {path: denoiser.backbone.get_submodule(path) for path in paths}
        for layer in self.layers.values():
            layer.set_adapter(self.selected)  # peft keeps the list itself
            layer.cast_input_dtype_enabled = False  # an Engine's passes have one precision: a float32 copy of each input would be for nothing
        self._check()
        for name in names:
            for _, part in self.parts(name):
                part.requires_grad_(True)  # set_adapter took it away, for the last time

    def _inject(self, name: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype

        config = LoraConfig(r=self.config["rank"], lora_alpha=self.config["alpha"], target_modules=self.config["targets"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, self.denoiser.backbone, adapter_name=name)
        cast_adapter_dtype(self.denoiser.backbone, name)

    def _check(self) -> None:
        """That peft shares the list, and adapts these layers and no others, neither of which it promises."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = [name for name, m in self.denoiser.backbone.named_modules() if isinstance(m, BaseTunerLayer)]
        if adapted != list(self.layers) or any(layer.active_adapters is not self.selected for layer in self.layers.values()):
            raise RuntimeError("this version of peft selects adapters in another way: install peft 0.21")

    def parts(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """(name, A or B) of each layer of one adapter."""
        for path, layer in self.layers.items():
            for part in PARTS:
                yield f"{path}.{part}", getattr(layer, part)[name]

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Inside, the denoiser has this adapter; None: it has none, as outside."""
        before = tuple(self.selected)
        self.selected[:] = () if name is None else (name,)
        try:
            yield
        finally:
            self.selected[:] = before

    def enable_checkpointing(self) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again. Raises ValueError where the network cannot."""
        _unet(self.denoiser.backbone).enable_gradient_checkpointing(self.checkpoint)

    def checkpoint(self, module, *inputs):
        """Activation checkpointing that computes again with the adapter of the forward pass, whichever is selected in the backward pass."""
        name = self.selected[0] if self.selected else None

        def run(*inputs):
            with self.use(name):
                return module(*inputs)

        return checkpoint.checkpoint(run, *inputs, use_reentrant=False)


class LoraRole(nn.Module):
    """One adapter of a bank as a network: it calls `model`, the bank's denoiser or a ScoreModel of it, with the adapter selected.

    Its parameters are the adapter's, under the names that diffusers and peft save them by, and a ScoreModel's discriminator head. The shared
    network is not among its modules, so nothing that wraps, casts or saves this one touches it.
    """

    def __init__(self, bank: LoraBank, name: str, model: Denoiser | ScoreModel):
        super().__init__()
        self.adapter, self.schedule, self.shared = name, bank.denoiser.schedule, (bank, model)  # a tuple hides modules from nn.Module
        for path, part in bank.parts(name):
            _register(self, path.split("."), part)
        if isinstance(model, ScoreModel):
            self.disc = model.disc

    def forward(self, *inputs, **options):
        bank, model = self.shared
        with bank.use(self.adapter):
            return model(*inputs, **options)


def _register(owner: nn.Module, path: list[str], module: nn.Module) -> None:
    """A module under a dotted name, with bare modules in between."""
    for name in path[:-1]:
        if name not in owner._modules:
            owner.add_module(name, nn.Module())
        owner = owner._modules[name]
    owner.add_module(path[-1], module)


# --- saved adapters: a LoraRole's own tensors, and {"rank", "alpha", "targets", "base"} --------------------------------------


@torch.no_grad()
def merge(backbone: nn.Module, lora: dict, tensors: dict[str, Tensor]) -> None:
    """Add a saved adapter to the weights of its base. Raises ValueError where it is not of this network."""
    paths = layers_of(backbone, tuple(lora["targets"]))
    missing = {f"{path}.{part}.weight" for path in paths for part in PARTS} ^ tensors.keys()
    if missing:
        raise ValueError(f"{len(missing)} weights of the adapter are missing or too many, such as {min(missing)}")
    for path in paths:
        weight = backbone.get_submodule(path).weight
        A, B = (tensors[f"{path}.{part}.weight"].to(weight.device).float().flatten(1) for part in PARTS)  # of a convolution B is 1x1
        weight.add_((lora["alpha"] / lora["rank"] * (B @ A)).view_as(weight))


def file_metadata(lora: dict, tensors: dict[str, Tensor]) -> dict[str, str]:
    """What diffusers wants to find in a file's header: without it alpha is taken for the rank."""
    prefix = next(iter(tensors)).split(".")[0]  # "unet" or "transformer"
    config = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"]}
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in config.items()})}
