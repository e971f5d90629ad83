"""The EDM2 network: every layer preserves the magnitude of its activations, in expectation.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (config G; equations by their
numbers there). Written from the paper; parameter names are those of the public snapshots, so that `from_nvlabs` is a rename.

Weights have any scale at rest: each layer normalises its own in forward, with gradient (equation 47), and `fold_weights`
does it once for a network that is only called. The *forced* half of weight normalisation, which keeps weights from growing, is the
optimizer's business and not forward's: `unit_norm_weights` names them, and the engine projects them once before each update. So a
network may run many forwards before one backward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.denoiser import Denoiser, at_least_float32
from models.schedules import EDM

EPS = 1e-4  # added to the RMS of what is normalised


def normalize(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """x / (EPS + RMS of x over dims); dims None: all but the first. The RMS is taken in float32 or better."""
    dims = tuple(range(1, x.ndim)) if dims is None else dims
    count = math.prod([x.shape[d] for d in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=at_least_float32(x).dtype)
    return x / torch.add(EPS, norm, alpha=count**-0.5).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps unit magnitude (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Blend of a and b, weight t on b, of unit magnitude if both have it and are uncorrelated (equation 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Concatenation over channels in which a and b contribute (1 - t) : t, of unit magnitude (equation 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * ((1 - t) * scale / math.sqrt(a.shape[1])), b * (t * scale / math.sqrt(b.shape[1]))], dim=1)


def resample(x: Tensor, mode: str, taps: tuple[float, ...]) -> Tensor:
    """Halve ("down") or double ("up") the resolution, or "keep" it. taps: a 1-D low-pass filter of even length."""
    if mode == "keep":
        return x
    if len(taps) == 2 and taps[0] == taps[1]:  # the default filter is pooling and repetition, bit for bit, and those are faster
        if mode == "down":
            return F.avg_pool2d(x, 2)
        B, C, H, W = x.shape  # repeated by hand: interpolate takes five times as long on a CPU
        return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(B, C, 2 * H, 2 * W)
    f = torch.tensor(taps, dtype=torch.float32, device=x.device)
    f = (torch.outer(f, f) / f.sum() ** 2).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, f, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * f, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude (equation 75): [B] -> [B, channels], computed in float32."""

    def __init__(self, channels: int, bandwidth: float = 1.0):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (at_least_float32(x).outer(self.freqs.to(at_least_float32(x).dtype)) + self.phases).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution, or a linear layer where kernel is (), with a normalised weight and no bias (equation 47)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

        self.folded = False

    def scaled_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        w = at_least_float32(self.weight)
        return normalize(w) * (gain / math.sqrt(w[0].numel()))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        if self.folded:
            w = self.weight if gain is None else self.weight * gain
        else:
            w = self.scaled_weight(1.0 if gain is None else gain)
        w = w.to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    """Encoder or decoder block (figure 21): resample, residual branch modulated by the embedding, attention."""

    def __init__(self, in_channels, out_channels, emb_channels, flavor="enc", resample_mode="keep", attention=False, *,
                 resample_filter=(1, 1), channels_per_head=64, dropout=0.0, res_balance=0.3, attn_balance=0.3, clip_act=256):
        super().__init__()
        self.flavor, self.resample_mode, self.resample_filter = flavor, resample_mode, tuple(resample_filter)
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.res_balance, self.attn_balance, self.clip_act = dropout, res_balance, attn_balance, clip_act
        self.emb_gain = nn.Parameter(torch.zeros(1))  # [1], not []: DeepSpeed cannot broadcast a tensor without dimensions
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels, ())
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample_mode, self.resample_filter)
        if self.flavor == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, (1,))  # pixel norm
        y = self.residual(x, emb)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self.attention(x), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def residual(self, x: Tensor, emb: Tensor) -> Tensor:
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        return self.conv_res1(F.dropout(y, self.dropout, self.training))

    def attention(self, x: Tensor) -> Tensor:
        """Cosine attention: q, k and v have unit magnitude over the channels of a head (section 2.3)."""
        B, C, H, W = x.shape
        qkv = self.attn_qkv(x).reshape(B, self.num_heads, C // self.num_heads, 3, H * W)  # q, k, v interleaved innermost
        q, k, v = normalize(qkv, (2,)).permute(3, 0, 1, 4, 2).unbind(0)  # each [B, heads, HW, channels]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.attn_proj(y.transpose(2, 3).reshape(B, C, H, W))


class EDM2UNet(nn.Module):
    """The raw network F of EDM2 (table 6 and figure 21 of the paper).

    x [B, img_channels, R, R], c_noise [B], cond {"labels": [B]} -> [B, img_channels, R, R]. `features` are the last
    encoder output, [B, C, R / 2^levels, ...]. Labels of -1, or cond None, are the all-zero label. A block whose width is
    below channels_per_head has no attention, wherever it is asked for: that is how the published network behaves.
    guided: the strength of guidance is an input, cond["guidance"] [B] (Meng et al. 2023, section 3).
    """

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int = 0, model_channels: int = 192,
                 channel_mult=(1, 2, 3, 4), channel_mult_noise: int | None = None, channel_mult_emb: int | None = None,
                 num_blocks: int = 3, attn_resolutions=(16, 8), label_balance: float = 0.5, concat_balance: float = 0.5, guided: bool = False, **block):
        super().__init__()
        self.config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                           model_channels=model_channels, channel_mult=list(channel_mult), channel_mult_noise=channel_mult_noise,
                           channel_mult_emb=channel_mult_emb, num_blocks=num_blocks, attn_resolutions=list(attn_resolutions),
                           label_balance=label_balance, concat_balance=concat_balance, guided=guided, **block)
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        widths = [model_channels * m for m in channel_mult]
        noise = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        emb = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, emb, ())
        self.emb_label = MPConv(label_dim, emb, ()) if label_dim else None
        if guided:
            self.emb_guidance_fourier, self.emb_guidance = MPFourier(noise), MPConv(noise, emb, ())
            self.guidance_gain = nn.Parameter(torch.zeros(1))  # at first, the strength changes nothing
        self.guided = guided
        self.enc, skips = self._encoder(img_resolution, img_channels + 1, widths, emb, num_blocks, attn_resolutions, block)
        self.feature_channels = skips[-1]
        self.feature_resolution = img_resolution >> (len(widths) - 1)
        self.dec = self._decoder(img_resolution, skips, widths, emb, num_blocks, attn_resolutions, block)
        self.out_conv = MPConv(widths[0], img_channels, (3, 3))

    @staticmethod
    def _encoder(R, channels, widths, emb, num_blocks, attn_resolutions, block):
        """Names and modules from the highest resolution down, and the width of every skip."""
        enc, skips = nn.ModuleDict(), []
        for level, width in enumerate(widths):
            r = R >> level
            if level == 0:
                enc[f"{r}x{r}_conv"] = MPConv(channels, width, (3, 3))
                channels = width
            else:
                enc[f"{r}x{r}_down"] = Block(channels, channels, emb, "enc", "down", **block)
            skips.append(channels)
            for i in range(num_blocks):
                enc[f"{r}x{r}_block{i}"] = Block(channels, width, emb, "enc", attention=r in attn_resolutions, **block)
                channels = width
                skips.append(channels)
        return enc, skips

    @staticmethod
    def _decoder(R, skips, widths, emb, num_blocks, attn_resolutions, block):
        """The encoder's mirror image: every block takes one skip. The innermost `in0` always asks for attention."""
        dec, skips, channels = nn.ModuleDict(), list(skips), skips[-1]
        for level in reversed(range(len(widths))):
            r = R >> level
            if level == len(widths) - 1:
                dec[f"{r}x{r}_in0"] = Block(channels, channels, emb, "dec", attention=True, **block)
                dec[f"{r}x{r}_in1"] = Block(channels, channels, emb, "dec", **block)
            else:
                dec[f"{r}x{r}_up"] = Block(channels, channels, emb, "dec", "up", **block)
            for i in range(num_blocks + 1):
                dec[f"{r}x{r}_block{i}"] = Block(channels + skips.pop(), widths[level], emb, "dec", attention=r in attn_resolutions, **block)
                channels = widths[level]
        return dec

    def forward(self, x: Tensor, c_noise: Tensor, cond: dict | None = None, features: bool | str = False):
        x = x.to(self.out_conv.weight.dtype)
        emb = self.embedding(c_noise, cond).to(x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, module in self.enc.items():
            x = module(x) if "conv" in name else module(x, emb)
            skips.append(x)
        bottleneck = x
        if features == "only":
            return None, bottleneck
        for name, module in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = module(x, emb)
        output = self.out_conv(x, gain=self.out_gain)
        return (output, bottleneck) if features else output

    def embedding(self, c_noise: Tensor, cond: dict | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(c_noise).to(self.emb_noise.weight.dtype))
        if self.emb_label is not None:
            labels = c_noise.new_full(c_noise.shape, -1, dtype=torch.long) if cond is None else cond["labels"]
            onehot = F.one_hot(labels.clamp(min=0), self.label_dim) * (labels >= 0)[:, None]
            emb = mp_sum(emb, self.emb_label(onehot.to(emb.dtype) * math.sqrt(self.label_dim)), self.label_balance)
        if self.guided:
            w = torch.ones_like(c_noise) if cond is None else cond["guidance"]
            emb = emb + self.emb_guidance(self.emb_guidance_fourier(w).to(emb.dtype), gain=self.guidance_gain)
        return mp_silu(emb)


class LogVar(nn.Module):
    """u(t), the log-variance of the denoising loss, learned beside the network (equations 14 to 17): c_noise [B] -> [B]."""

    def __init__(self, channels: int = 128):
        super().__init__()
        self.config = dict(channels=channels)
        self.fourier = MPFourier(channels)
        self.linear = MPConv(channels, 1, ())

    def forward(self, c_noise: Tensor) -> Tensor:
        return at_least_float32(self.linear(self.fourier(c_noise).to(self.linear.weight.dtype))[:, 0])


def unit_norm_weights(module: nn.Module) -> list[str]:
    """Names of the parameters that forced weight normalisation keeps at unit magnitude, row by row. Empty without MPConv layers."""
    return [f"{name}.weight" for name, m in module.named_modules() if isinstance(m, MPConv)]


@torch.no_grad()
def fold_weights(module: nn.Module) -> nn.Module:
    """Normalise every weight once and for all, in float32, for a frozen network that is only called: forward then skips it.

    Returns the module, changed in place. Its weights are no longer those of a checkpoint: do not train it, save it or load into it.
    """
    for m in module.modules():
        if isinstance(m, MPConv) and not m.folded:
            m.weight.copy_(m.scaled_weight())
            m.folded = True
    return module


def from_nvlabs(config: dict, state_dict: dict[str, Tensor]) -> Denoiser:
    """An EDM2 network from a public snapshot's constructor arguments and tensors, under their own names.

    config: arguments of the preconditioned network (img_resolution, img_channels, label_dim, sigma_data, logvar_channels,
    and the U-Net's). Raises ValueError if tensors are missing, left over or of another shape.
    """
    unet = {k: v for k, v in config.items() if k not in ("use_fp16", "sigma_data", "logvar_channels")}
    denoiser = Denoiser(EDM2UNet(**unet), EDM(sigma_data=config.get("sigma_data", 0.5)), "edm", LogVar(config.get("logvar_channels", 128)))
    prefixes = {"unet.": "backbone.", "logvar_fourier.": "logvar.fourier.", "logvar_linear.": "logvar.linear."}
    renamed = {}
    for key, value in state_dict.items():
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        renamed[prefixes.get(prefix, "") + key.removeprefix(prefix)] = torch.atleast_1d(value.float())
    try:
        denoiser.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"these weights are not of an EDM2 network with that configuration: {error}") from None
    return denoiser.eval().requires_grad_(False)
