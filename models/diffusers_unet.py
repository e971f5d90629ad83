"""diffusers' UNet2DModel as a backbone of this house: the networks of DDPM and of its many pipelines.

diffusers is imported when a network is made and not before, because that takes seconds.
"""

import torch
from torch import Tensor, nn

WANTED = {"time_embedding_type": "positional", "class_embed_type": None, "center_input_sample": False}  # other values are another network


class DiffusersUNet(nn.Module):
    """A UNet2DModel behind the contract of `Denoiser`: x [B, img_channels, R, R], c_noise [B] (the level's index from 0, also
    fractional), cond {"labels": [B]} -> [B, out_channels, R, R]. `features` are the mid block's output.

    label_dim: classes, 0 for none. null_class: the class embedding has one row more, the last, that means "no label"; without it a
    label of -1, or cond None, is a ValueError. unet: arguments of UNet2DModel. out_channels: img_channels by default.
    """

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, null_class: bool = False, out_channels: int | None = None, **unet):
        super().__init__()
        from diffusers import UNet2DModel

        _check(unet)
        unet["out_channels"] = img_channels if out_channels is None else out_channels
        rows = label_dim + null_class if label_dim else None
        self.unet = UNet2DModel(sample_size=img_resolution, in_channels=img_channels, num_class_embeds=rows, **unet)
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in unet.items()}  # as JSON has them
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim, null_class=null_class, **lists)
        self.label_dim, self.null_class = label_dim, null_class
        widths = self.unet.config.block_out_channels
        self.feature_channels, self.feature_resolution = widths[-1], img_resolution >> (len(widths) - 1)

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        unet = self.unet
        x = x.to(unet.conv_in.weight.dtype)
        emb = self.embedding(c_noise, cond, x.dtype)
        x = unet.conv_in(x)
        skips = [x]
        for block in unet.down_blocks:
            x, passed = block(hidden_states=x, temb=emb)
            skips += passed
        bottleneck = x = x if unet.mid_block is None else unet.mid_block(x, emb)
        if features == "only":
            return None, bottleneck
        for block in unet.up_blocks:
            taken = len(block.resnets)
            x = block(x, tuple(skips[-taken:]), emb)
            del skips[-taken:]
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return (output, bottleneck) if features else output

    def embedding(self, c_noise: Tensor, cond: dict | None, dtype: torch.dtype) -> Tensor:
        emb = self.unet.time_embedding(self.unet.time_proj(c_noise).to(dtype))  # the sinusoids are float32 whatever the weights are
        if self.label_dim:
            emb = emb + self.unet.class_embedding(self._rows(c_noise, cond)).to(dtype)
        return emb

    def _rows(self, c_noise: Tensor, cond: dict | None) -> Tensor:
        """Labels -> rows of the class embedding: -1 is the null class, if there is one."""
        labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.long) if cond is None else cond["labels"]
        if self.null_class:
            return torch.where(labels < 0, self.label_dim, labels)
        if labels.device.type == "cpu" and bool((labels < 0).any()):  # on a GPU the embedding itself fails, and nothing waits for it
            raise ValueError(f"this network has {self.label_dim} classes and none that means no label: give every image one of them")
        return labels


def _check(unet: dict) -> None:
    for name, value in WANTED.items():
        if unet.get(name, value) != value:
            raise ValueError(f"a UNet2DModel of {name} {unet[name]!r} is not supported, only {value!r}")
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    if any("Skip" in block for block in blocks):
        raise ValueError("a UNet2DModel of Skip blocks is not supported: its images pass beside the network")


def from_unet_config(config: dict) -> dict:
    """The config.json of a UNet2DModel -> arguments of DiffusersUNet. Every row of a class embedding is a class: no file says that one is not."""
    unet = {key: value for key, value in config.items() if not key.startswith("_")}
    _check(unet)
    size = unet.pop("sample_size", None)
    side = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    if not isinstance(side, int):
        raise ValueError(f"a UNet2DModel of sample_size {size} is not supported: images here are square and of one size")
    return {"img_resolution": side, "img_channels": unet.pop("in_channels", 3), "label_dim": unet.pop("num_class_embeds", None) or 0, **unet}
