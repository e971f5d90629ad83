"""diffusers' networks that are told a prompt, as backbones of this house: the UNets of Stable Diffusion and SDXL, and the transformers of
Stable Diffusion 3 and Sana.

Prompts come as embeddings (models/conditioning.py makes them). Each forward is diffusers' own, block by block, so that it can stop at the
middle. diffusers is imported when a network is made and not before, because that takes seconds.
"""

import json
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME_IDS = 6  # of SDXL: original height and width, crop's top and left, target's height and width
UNET_WANTED = {"time_embedding_type": "positional", "class_embed_type": None, "num_class_embeds": None, "center_input_sample": False,
               "encoder_hid_dim": None, "encoder_hid_dim_type": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
               "attention_type": "default"}  # other values are another network
UNET_SIZES = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")  # that SDXL's pooled embedding is known by
UNET_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D", None)


class PromptBackbone(nn.Module, ABC):
    """A network behind the contract of `Denoiser` that is told a prompt: x [B, img_channels, R, R], c_noise [B], cond -> as x.

    network: arguments of the diffusers class, under its names. `conditions`: the keys that cond must have, each with its shape for one image,
    in which prompts have prompt_tokens, by default those of the network's own pipeline. It has no classes: label_dim is 0.
    """

    kind, defaults, tokens = "", {}, 0  # the diffusers class, its own defaults of sizes and channels, and its pipeline's number of tokens

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, prompt_tokens: int | None = None, **network):
        super().__init__()
        if label_dim:
            raise ValueError(f"label_dim is {label_dim}, and a {self.kind} is told prompts, not classes: it must be 0")
        self.check(img_resolution, network)
        sizes = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=0, prompt_tokens=prompt_tokens or self.tokens)
        self.config = {**sizes, **json.loads(json.dumps(network))}  # with lists for tuples
        self.conditions = self.conditions_of(self.config)

    @classmethod
    def check(cls, resolution: int, network: dict) -> None:
        """Raises ValueError for arguments that make another kind of network."""

    @classmethod
    @abstractmethod
    def conditions_of(cls, config: dict) -> dict[str, list[int]]:
        """`conditions` of a backbone of this config."""

    @classmethod
    def from_diffusers(cls, config: dict) -> dict:
        """The config.json of a diffusers network -> arguments of the backbone."""
        network = {**cls.defaults, **{key: value for key, value in config.items() if not key.startswith("_")}}
        size, channels, out = network.pop("sample_size"), network.pop("in_channels"), network.pop("out_channels")
        side = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
        if not isinstance(side, int):
            raise ValueError(f"a {cls.kind} of sample_size {size} is not supported: latents here are square and of one size")
        if out is not None and out != channels:
            raise ValueError(f"a {cls.kind} that makes {out} channels of {channels} is not supported: in_channels and out_channels must agree")
        cls.check(side, network)
        return {"img_resolution": side, "img_channels": channels, "label_dim": 0, "prompt_tokens": cls.tokens, **network}

    def given(self, cond: dict | None, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The conditions of `count` images, in the weights' precision; SDXL's sizes in float32. Raises ValueError where they do not fit."""
        for key, shape in self.conditions.items():
            found = None if cond is None or key not in cond else list(cond[key].shape)
            fits = found is not None and len(found) == len(shape) + 1 and found[0] == count and (key == "prompt_mask" or found[-1] == shape[-1])
            if not fits:  # the number of tokens is free
                wanted = f"this network wants {', '.join(self.conditions)} for each image, and {key} of {[count, *shape]}"
                raise ValueError(f"cond[{key!r}] is {'missing' if found is None else found}: {wanted}")
        return {key: cond[key].float() if key == "time_ids" else cond[key].to(dtype) for key in self.conditions}


class DiffusersPromptUNet(PromptBackbone):
    """A UNet2DConditionModel of the kinds of Stable Diffusion 1 and 2 and of SDXL. c_noise: the level's index from 0, also fractional.

    cond: "prompt_embeds" [B, L, D], and where addition_embed_type is "text_time", as in SDXL, "pooled" [B, P] and "time_ids" [B, 6].
    `features` are the mid block's output.
    """

    kind, defaults, tokens = "UNet2DConditionModel", {"sample_size": None, "in_channels": 4, "out_channels": 4}, 77

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, prompt_tokens: int | None = None, **unet):
        super().__init__(img_resolution, img_channels, label_dim, prompt_tokens, **unet)
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(sample_size=img_resolution, in_channels=img_channels, out_channels=img_channels, **unet)
        widths = self.unet.config.block_out_channels
        self.feature_channels, self.feature_resolution = widths[-1], img_resolution >> (len(widths) - 1)
        self.down_crosses, self.up_crosses = (["CrossAttn" in kind for kind in self.unet.config[name]] for name in ("down_block_types", "up_block_types"))

    @classmethod
    def check(cls, resolution, network):
        for name, value in UNET_WANTED.items():
            if network.get(name, value) != value:
                raise ValueError(f"a UNet2DConditionModel of {name} {network[name]!r} is not supported, only {value!r}")
        blocks = [*network.get("down_block_types", ()), network.get("mid_block_type"), *network.get("up_block_types", ())]
        strange = [str(block) for block in blocks if block not in UNET_BLOCKS]
        width, added = network.get("cross_attention_dim", 1280), network.get("addition_embed_type")
        if strange or added not in (None, "text_time") or not isinstance(width, int):
            what = strange[0] if strange else f"addition_embed_type {added}" if added not in (None, "text_time") else f"cross_attention_dim {width}"
            raise ValueError(f"a UNet2DConditionModel of {what} is not supported: those of Stable Diffusion and SDXL are")
        if added is not None and not all(isinstance(network.get(name), int) for name in UNET_SIZES):
            raise ValueError(f"a UNet2DConditionModel of addition_embed_type {added} needs {' and '.join(UNET_SIZES)}")
        halved = len(network.get("down_block_types", range(4))) - 1
        if resolution % 2**halved:
            raise ValueError(f"a UNet2DConditionModel of sample_size {resolution} is not supported: it halves its latents {halved} times")

    @classmethod
    def conditions_of(cls, config):
        conditions = {"prompt_embeds": [config["prompt_tokens"], config.get("cross_attention_dim", 1280)]}
        if config.get("addition_embed_type") is None:
            return conditions
        pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        return {**conditions, "pooled": [pooled], "time_ids": [TIME_IDS]}

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again."""
        self.unet.enable_gradient_checkpointing()

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        unet, dtype = self.unet, self.unet.conv_in.weight.dtype
        told = self.given(cond, len(x), dtype)
        prompt = {"encoder_hidden_states": told["prompt_embeds"]}
        emb = self.embedding(c_noise, told, dtype)
        x = unet.conv_in(x.to(dtype))
        skips = [x]
        for block, crosses in zip(unet.down_blocks, self.down_crosses):
            x, passed = block(hidden_states=x, temb=emb, **(prompt if crosses else {}))
            skips += passed
        bottleneck = x = x if unet.mid_block is None else unet.mid_block(x, emb, **prompt)
        if features == "only":
            return None, bottleneck
        for block, crosses in zip(unet.up_blocks, self.up_crosses):
            taken = len(block.resnets)
            x = block(hidden_states=x, res_hidden_states_tuple=tuple(skips[-taken:]), temb=emb, **(prompt if crosses else {}))
            del skips[-taken:]
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return (output, bottleneck) if features else output

    def embedding(self, c_noise: Tensor, told: dict, dtype: torch.dtype) -> Tensor:
        emb = self.unet.time_embedding(self.unet.time_proj(c_noise).to(dtype))  # the sinusoids are float32 whatever the weights are
        if "pooled" not in told:
            return emb
        return emb + self.unet.get_aug_embed(emb, told["prompt_embeds"], {"text_embeds": told["pooled"], "time_ids": told["time_ids"]})


class PromptTransformer(PromptBackbone):
    """What transformers on patches share. `features` are the tokens behind half of the blocks, as a map [B, C, h, w]."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, prompt_tokens: int | None = None, **network):
        super().__init__(img_resolution, img_channels, label_dim, prompt_tokens, **network)
        self.transformer = self.make(sample_size=img_resolution, in_channels=img_channels, out_channels=img_channels, **network)
        config, self.checkpointing = self.transformer.config, False
        if img_resolution % config.patch_size:
            raise ValueError(f"a {self.kind} of sample_size {img_resolution} is not supported: its patches of {config.patch_size} do not tile that")
        self.feature_channels, self.feature_resolution = config.num_attention_heads * config.attention_head_dim, img_resolution // config.patch_size
        self.middle = max(1, len(self.transformer.transformer_blocks) // 2)

    @abstractmethod
    def make(self, **network) -> nn.Module:
        """diffusers' own network."""

    @abstractmethod
    def enter(self, x: Tensor, c_noise: Tensor, told: dict) -> tuple[Tensor, ...]:
        """-> tokens [B, h w, C], and what else passes from block to block."""

    @abstractmethod
    def through(self, block: nn.Module, tokens: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        """One block: what `enter` gave -> the same, one block later."""

    @abstractmethod
    def leave(self, tokens: Tensor, *rest: Tensor | None) -> Tensor:
        """The last tokens -> [B, h w, patch * patch * img_channels]."""

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again."""
        self.checkpointing = True

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        dtype = self.transformer.proj_out.weight.dtype
        state = self.enter(x.to(dtype), c_noise, self.given(cond, len(x), dtype))
        bottleneck, side = None, self.feature_resolution
        for count, block in enumerate(self.transformer.transformer_blocks, 1):
            again = self.checkpointing and torch.is_grad_enabled()
            state = checkpoint(self.through, block, *state, use_reentrant=False) if again else self.through(block, *state)
            if features and count == self.middle:
                bottleneck = state[0].transpose(1, 2).unflatten(2, (side, side)).contiguous()
                if features == "only":
                    return None, bottleneck
        patch = self.transformer.config.patch_size
        patches = self.leave(*state).unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # [B, h, w, patch, patch, C]
        output = patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        return (output, bottleneck) if features else output


class DiffusersSD3(PromptTransformer):
    """An SD3Transformer2DModel: Stable Diffusion 3 and 3.5. c_noise: 1000 sigma. cond: "prompt_embeds" [B, L, D] and "pooled" [B, P]."""

    kind, defaults, tokens = "SD3Transformer2DModel", {"sample_size": 128, "in_channels": 16, "out_channels": 16}, 77 + 256

    @classmethod
    def conditions_of(cls, config):
        return {"prompt_embeds": [config["prompt_tokens"], config.get("joint_attention_dim", 4096)], "pooled": [config.get("pooled_projection_dim", 2048)]}

    def make(self, **network):
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(**network)

    def enter(self, x, c_noise, told):
        net = self.transformer
        return net.pos_embed(x).contiguous(), net.context_embedder(told["prompt_embeds"]), net.time_text_embed(c_noise, told["pooled"])

    def through(self, block, tokens, prompt, emb):
        prompt, tokens = block(hidden_states=tokens, encoder_hidden_states=prompt, temb=emb)
        return tokens, prompt, emb

    def leave(self, tokens, prompt, emb):
        return self.transformer.proj_out(self.transformer.norm_out(tokens, emb))


class DiffusersSana(PromptTransformer):
    """A SanaTransformer2DModel. c_noise: 1000 sigma. cond: "prompt_embeds" [B, L, D] and "prompt_mask" [B, L], 1 where there is a token."""

    kind, defaults, tokens = "SanaTransformer2DModel", {"sample_size": 32, "in_channels": 32, "out_channels": 32}, 300

    @classmethod
    def check(cls, resolution, network):
        if network.get("guidance_embeds"):
            raise ValueError("a SanaTransformer2DModel of guidance_embeds true is not supported: it is told its guidance, as distilled ones are")

    @classmethod
    def conditions_of(cls, config):
        return {"prompt_embeds": [config["prompt_tokens"], config.get("caption_channels", 2304)], "prompt_mask": [config["prompt_tokens"]]}

    def make(self, **network):
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel(**network)

    def enter(self, x, c_noise, told):
        net = self.transformer
        emb, last = net.time_embed(c_noise * net.config.timestep_scale, batch_size=len(x), hidden_dtype=x.dtype)
        prompt = net.caption_norm(net.caption_projection(told["prompt_embeds"]))
        return net.patch_embed(x), prompt, (1 - told["prompt_mask"])[:, None] * -10000.0, emb, last

    def through(self, block, tokens, prompt, bias, emb, last):
        side = self.feature_resolution
        return block(tokens, None, prompt, bias, emb, side, side), prompt, bias, emb, last

    def leave(self, tokens, prompt, bias, emb, last):
        return self.transformer.proj_out(self.transformer.norm_out(tokens, last, self.transformer.scale_shift_table))
