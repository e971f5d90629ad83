"""Several roles on one frozen network."""

import copy
import json
import warnings

import pytest
import torch
from diffusers import (EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import tiny_denoiser
from models import hub, lora
from models.denoiser import Denoiser, ScoreModel
from models.diffusers_conditional import DiffusersPromptUNet, DiffusersSD3
from models.diffusers_unet import DiffusersUNet
from models.discriminator import DiscriminatorHead
from models.hub import ModelError
from models.lora import LoraBank, LoraRole
from models.schedules import DiscreteVP, Flow

ROLES = ("generator", "fake_score")
SDXL = dict(img_channels=4, prompt_tokens=5, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 10)
SD3 = dict(img_channels=16, prompt_tokens=5, patch_size=2, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
           caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8)
REAL_SDXL = {**SDXL, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "norm_num_groups": 32,
             "cross_attention_dim": 2048, "prompt_tokens": 77,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
             "transformer_layers_per_block": (1, 2, 10), "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}


def base(seed: int = 0) -> Denoiser:
    """A UNet2DModel with attention for 8x8 digits, that nobody trained."""
    torch.manual_seed(seed)
    net = DiffusersUNet(8, 1, 10, null_class=True, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
    return Denoiser(net, DiscreteVP(torch.linspace(1e-3, 0.1, 100)), "v").eval().requires_grad_(False)


def prompted(seed: int = 0) -> Denoiser:
    """A UNet2DConditionModel with all that SDXL's has."""
    torch.manual_seed(seed)
    return Denoiser(DiffusersPromptUNet(8, **SDXL), DiscreteVP(torch.linspace(1e-3, 0.1, 100)), "eps").eval().requires_grad_(False)


def banked(denoiser: Denoiser, names=ROLES, rank=4, alpha=8.0, targets=("dmd2",), seed=1) -> LoraBank:
    """Adapters that do something: B is random, not zero, and alpha is not the rank."""
    bank, random = LoraBank(denoiser, names, rank, alpha, targets), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for _, part in bank.parts(name):
                part.weight.copy_(0.2 * torch.randn(part.weight.shape, generator=random))
    return bank


def tensors(bank: LoraBank, name: str) -> dict:
    return {k: v.detach().clone() for k, v in LoraRole(bank, name, bank.denoiser).state_dict().items()}


def inputs(n: int = 4, seed: int = 3):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=random), torch.linspace(5, 95, n), {"labels": torch.arange(n) - 1}


def prompts(n: int = 2, seed: int = 3) -> tuple:
    random = torch.Generator().manual_seed(seed)
    cond = {"prompt_embeds": torch.randn(n, 5, 12, generator=random), "pooled": torch.randn(n, 10, generator=random),
            "time_ids": torch.tensor([[64.0, 64, 0, 3, 64, 64]]).repeat(n, 1)}
    return torch.randn(n, 4, 8, 8, generator=random), torch.linspace(5, 95, n), cond


def separate(denoiser: Denoiser, adapter: dict) -> Denoiser:
    """A copy of a base with one adapter, by peft alone."""
    made = copy.deepcopy(denoiser)
    targets = lora.resolve(made.backbone, ("dmd2",))
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)), made.backbone, adapter_name="only")
    for path, weight in adapter.items():
        layer, part = path.removesuffix(".weight").rsplit(".", 1)
        getattr(made.backbone.get_submodule(layer), part)["only"].weight.data.copy_(weight)
    return made


# --- one base is as good as three networks


@pytest.mark.parametrize("make, given", [(base, inputs), (prompted, prompts)], ids=["classes", "prompts"])
def test_one_base_is_three_networks(make, given):
    """Base, generator and fake score on one network compute what three networks with adapters of their own do, bit for bit, in any order."""
    alone, bank = make(), banked(make())
    roles = {name: LoraRole(bank, name, bank.denoiser) for name in ROLES}
    wanted = {name: separate(alone, tensors(bank, name))(*given()) for name in ROLES}
    for name in (None, "generator", "fake_score", None, "fake_score", "generator", None):
        assert torch.equal((roles[name] if name else bank.denoiser)(*given()), wanted[name] if name else alone(*given()))
    assert (wanted["generator"] - wanted["fake_score"]).abs().max() > 0.01 < (wanted["generator"] - alone(*given())).abs().max()


def test_fresh_adapters_change_nothing():
    """Before training every role is the base, exactly, and adapters of two names are two draws."""
    bank = LoraBank(base(), ROLES, 4, 4.0)
    wanted = base()(*inputs())
    assert all(torch.equal(LoraRole(bank, name, bank.denoiser)(*inputs()), wanted) for name in ROLES)
    a, b = (tensors(bank, name) for name in ROLES)
    assert all(torch.equal(a[k], b[k]) == k.endswith("lora_B.weight") for k in a)


def test_a_role_registers_its_adapter_alone():
    """Its parameters are the adapter's under peft's own keys, and the discriminator's; casting or freezing it leaves the base and others alone."""
    bank = banked(base())
    model = ScoreModel(bank.denoiser, DiscriminatorHead(16, 4))
    role, other = LoraRole(bank, "fake_score", model), LoraRole(bank, "generator", bank.denoiser)
    names = {n for n, _ in role.named_parameters() if not n.startswith("disc.")}
    assert names == {n for n, _ in other.named_parameters()} == {f"{path}.{part}.weight" for path in bank.layers for part in ("lora_A", "lora_B")}
    assert "unet.mid_block.attentions.0.to_out.0.lora_A.weight" in names and "unet.down_blocks.0.resnets.0.conv1.lora_B.weight" in names
    role.requires_grad_(False).double()
    trainable = {n for n, p in bank.denoiser.named_parameters() if p.requires_grad}
    assert trainable and all(".generator." in n for n in trainable)
    assert {p.dtype for n, p in bank.denoiser.named_parameters() if ".fake_score." not in n} == {torch.float32}
    assert not {id(p) for p in role.parameters()} & {id(p) for p in other.parameters()}


def test_selecting_never_touches_requires_grad():
    """A graph that was built with one adapter has all its gradients when another, or none, is selected before its backward pass."""
    bank = banked(base())
    roles, before = {n: LoraRole(bank, n, bank.denoiser) for n in ROLES}, [p.requires_grad for p in bank.denoiser.parameters()]
    grads = []
    for between in (lambda: None, lambda: roles["fake_score"](*inputs()), lambda: bank.denoiser(*inputs())):
        out = roles["generator"](*inputs()).square().sum()
        between()
        with bank.use("fake_score"):
            grads.append(torch.autograd.grad(out, list(roles["generator"].parameters())))
        assert [p.requires_grad for p in bank.denoiser.parameters()] == before and bank.selected == []
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other)) and all(g.abs().max() > 0 for g in grads[0])


def test_gradient_crosses_a_frozen_role():
    """From the frozen fake score's features through the same layers into the generator: the generator's gradients are those of separate networks."""
    alone, bank = base(), banked(base())
    generator, fake = (LoraRole(bank, n, bank.denoiser) for n in ROLES)
    fake.requires_grad_(False)
    apart, apart_fake = (separate(alone, tensors(bank, n)) for n in ROLES)
    x, t, cond = inputs()
    for first, second in ((generator, fake), (apart, apart_fake.requires_grad_(False))):
        second(first(x, t, cond), t, cond).square().sum().backward()
    for n, p in generator.named_parameters():
        layer, part = n.removesuffix(".weight").rsplit(".", 1)
        assert torch.equal(p.grad, getattr(apart.backbone.get_submodule(layer), part)["only"].weight.grad)
    assert all(p.grad is None for n, p in bank.denoiser.named_parameters() if ".generator." not in n)


@pytest.mark.parametrize("make, given", [(base, inputs), (prompted, prompts)], ids=["classes", "prompts"])
def test_checkpointing_computes_again_with_the_same_adapter(make, given):
    """With another adapter selected at the backward pass, gradients are those without checkpointing; diffusers' own function is silently wrong."""
    grads = {}
    for how in ("none", "ours", "diffusers"):
        bank = banked(make())
        role = LoraRole(bank, "generator", bank.denoiser)
        if how == "ours":
            bank.enable_checkpointing()
        elif how == "diffusers":
            bank.denoiser.backbone.unet.enable_gradient_checkpointing()
        bank.denoiser.train()  # some blocks checkpoint in training alone
        x, t, cond = given()
        out = role(x.requires_grad_(), t, cond).square().sum()
        with bank.use("generator" if how == "none" else "fake_score"):
            grads[how] = torch.autograd.grad(out, list(role.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads["none"], grads["ours"]))
    assert any((a - b).abs().max() > 0.1 * a.abs().max() for a, b in zip(grads["none"], grads["diffusers"]))


def test_a_bfloat16_base_keeps_float32_adapters():
    """Adapters of a bfloat16 network are float32, and steps below bfloat16's resolution move them."""
    bank = banked(base().bfloat16())
    role = LoraRole(bank, "generator", bank.denoiser)
    assert {p.dtype for p in role.parameters()} == {torch.float32} and bank.denoiser.backbone.unet.conv_in.weight.dtype == torch.bfloat16
    before, optimizer = tensors(bank, "generator"), torch.optim.Adam(role.parameters(), lr=1e-5)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            role(*inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(0 < (p - before[n]).abs().max() < 1e-4 for n, p in role.named_parameters())


# --- what it adapts


def test_a_preset_is_filtered_and_a_name_is_not():
    """Of a preset the names that there are; a name of one's own must be there."""
    net = base().backbone
    found = lora.resolve(net, ("dmd2",))
    assert set(found) == {"to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
                          "time_emb_proj"}
    assert lora.resolve(net, ("attention", "conv_in", "to_q")) == ("to_q", "to_k", "to_v", "to_out.0", "conv_in")
    assert len(lora.layers_of(net, ("to_q",))) == 4 and lora.layers_of(net, ("o_q",)) == []
    for targets in (("attention", "to_qq"), ("group_norm",)):
        with pytest.raises(ValueError, match=f"lora.targets {targets[-1]} names no nn.Linear or nn.Conv2d of its DiffusersUNet"):
            lora.resolve(net, targets)


def test_networks_of_layers_of_their_own_are_refused():
    """EDM2's convolutions normalise their weights, which an adapter beside them would miss."""
    with pytest.raises(ValueError, match="lora.targets dmd2 names no nn.Linear or nn.Conv2d of its EDM2UNet .diffusers' networks are made of them"):
        LoraBank(tiny_denoiser(), ROLES, 4, 4.0)


def test_sdxl_fits_where_three_of_it_do_not():
    """Of SDXL's real shapes: 788 layers and 196,751,360 parameters an adapter at rank 64; one bfloat16 base, two adapters in training with Adam, and
    the average of one, take less than 13 GiB; three bases would take 9.6 more."""
    with torch.device("meta"):
        denoiser = Denoiser(DiffusersPromptUNet(128, **REAL_SDXL), DiscreteVP(torch.linspace(1e-3, 0.1, 10)), "eps").bfloat16().requires_grad_(False)
        frozen = sum(p.numel() * p.element_size() for p in denoiser.parameters())
        bank = LoraBank(denoiser, ROLES, 64, 8.0)
    assert len(bank.layers) == 788 and frozen == 2 * 2_567_463_684
    generator, fake = ([p.numel() for p in LoraRole(bank, name, denoiser).parameters()] for name in ROLES)
    assert sum(generator) == sum(fake) == 196_751_360 and len(generator) == 1576
    assert sum(p.numel() * p.element_size() for p in denoiser.parameters()) == frozen + 2 * 4 * 196_751_360  # one base; adapters float32
    state = frozen + (sum(generator) + sum(fake)) * 4 * (1 + 1 + 2) + sum(generator) * 4  # weight, gradient, two moments; the average
    assert state < 13 * 2**30 and 2 * frozen > 9.5 * 2**30


# --- saved adapters


def saved(folder, denoiser: Denoiser, targets=("dmd2",), **changes) -> tuple[LoraBank, dict]:
    """A base with its adapter's folder beside it, as a run writes them."""
    sampler = {"sampler": {"type": "few_step", "timesteps": [100.0]}}
    hub.save(folder / "base", {**hub.describe(denoiser), **sampler}, denoiser.state_dict())
    bank = banked(denoiser, targets=targets)
    found = tensors(bank, "generator")
    hub.save(folder / "lora", {**hub.describe(denoiser), **sampler, "lora": {**bank.config, "base": str(folder / "base"), **changes}}, found)
    return bank, found


@pytest.mark.parametrize("targets", [("dmd2",), ("conv_in", "attention"), ("downsamplers.0.conv",)], ids=str)
def test_a_saved_adapter_loads_merged(tmp_path, targets):
    """The folder of an adapter loads like any model's: the base's network with the adapter in its weights, and the same x0."""
    bank, _ = saved(tmp_path, base(), targets)
    role, loaded = LoraRole(bank, "generator", bank.denoiser), hub.load_denoiser(str(tmp_path / "lora"))
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["config.json", "pytorch_lora_weights.safetensors"]
    assert loaded.state_dict().keys() == base().state_dict().keys() and not any(p.requires_grad for p in loaded.parameters())
    assert (loaded(*inputs()) - role(*inputs())).abs().max() <= 1e-6 < 0.01 < (loaded(*inputs()) - base()(*inputs())).abs().max()
    assert hub.weights_file(str(tmp_path / "lora")).name == "pytorch_lora_weights.safetensors"
    assert hub.describe(loaded) == {k: v for k, v in hub.description(str(tmp_path / "lora")).items() if k not in ("sampler", "lora")}


def test_an_adapter_on_an_adapter(tmp_path):
    """The base of an adapter may itself be one."""
    saved(tmp_path, base())
    bank = banked(hub.load_denoiser(str(tmp_path / "lora")), ("generator",), seed=7)
    about = {**hub.description(str(tmp_path / "lora")), "lora": {**bank.config, "base": str(tmp_path / "lora")}}
    hub.save(tmp_path / "second", about, tensors(bank, "generator"))
    wanted = LoraRole(bank, "generator", bank.denoiser)(*inputs())
    assert (hub.load_denoiser(str(tmp_path / "second"))(*inputs()) - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("damage, said", [
    ("base", "it is a LoRA on .*base, which cannot be read: .*there is no model there"),
    ("layer", "does not fit config.json: 2 weights of the adapter are missing or too many, such as unet.conv_in.lora_A.weight"),
    ("file", "does not fit config.json"), ("rank", "does not fit config.json"), ("nothing", "does not fit config.json")])
def test_a_damaged_adapter_is_refused(tmp_path, damage, said):
    """A base that is not there, a layer less, a truncated file, a description without a rank: each one sentence."""
    saved(tmp_path, base(), ("attention", "conv_in"))
    file, config = tmp_path / "lora/pytorch_lora_weights.safetensors", tmp_path / "lora/config.json"
    about = json.loads(config.read_text())
    if damage == "base":
        (tmp_path / "base/config.json").unlink()
    elif damage == "layer":
        save_file({k: v for k, v in load_file(file).items() if "conv_in" not in k}, file)
    elif damage == "file":
        file.write_bytes(file.read_bytes()[:2000])
    else:
        changed = [] if damage == "nothing" else {k: v for k, v in about["lora"].items() if k != "rank"}
        config.write_text(json.dumps({**about, "lora": changed}))
    with pytest.raises(ModelError, match=said) as error:
        hub.load_denoiser(str(tmp_path / "lora"))
    assert "\n" not in str(error.value)


def pipeline() -> StableDiffusionXLPipeline:
    """A fresh SDXL pipeline, of which only the network is there."""
    return StableDiffusionXLPipeline(None, None, None, None, None, copy.deepcopy(prompted().backbone.unet), EulerDiscreteScheduler())


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    x, t, cond = prompts()
    return unet(x, t, cond["prompt_embeds"], added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}).sample


def active(unet: UNet2DConditionModel) -> int:
    return sum(isinstance(m, BaseTunerLayer) and bool(m.lora_A) for m in unet.modules())


def test_plain_diffusers_loads_the_adapter(tmp_path):
    """load_lora_weights of the written folder gives a fresh pipeline every layer, the scale, and the same output; with fuse_lora too."""
    bank, _ = saved(tmp_path, prompted())
    with bank.use("generator"):
        wanted = output(bank.denoiser.backbone.unet)
    pipe = pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # with which peft says that keys were lost
        pipe.load_lora_weights(str(tmp_path / "lora"))
    assert active(pipe.unet) == len(bank.layers) > 40 and torch.equal(output(pipe.unet), wanted)
    assert (output(pipeline().unet) - wanted).abs().max() > 0.01
    pipe.fuse_lora()
    assert (output(pipe.unet) - wanted).abs().max() < 1e-5


def test_plain_diffusers_loads_a_transformers_adapter(tmp_path):
    """Likewise into Stable Diffusion 3, whose network is called transformer; and its checkpointing, which knows no adapters, is refused."""
    torch.manual_seed(0)
    denoiser = Denoiser(DiffusersSD3(8, **SD3), Flow(3.0), "flow").eval().requires_grad_(False)
    pipe = StableDiffusion3Pipeline(copy.deepcopy(denoiser.backbone.transformer), FlowMatchEulerDiscreteScheduler(), *[None] * 7)
    bank, _ = saved(tmp_path, denoiser)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    given = dict(hidden_states=torch.randn(2, 16, 8, 8), encoder_hidden_states=torch.randn(2, 5, 12), pooled_projections=torch.randn(2, 10),
                 timestep=torch.tensor([300.0, 900.0]))
    with bank.use("generator"):
        wanted = denoiser.backbone.transformer(**given).sample
    assert active(pipe.transformer) == len(bank.layers) == 19 and torch.equal(pipe.transformer(**given).sample, wanted)
    with pytest.raises(ValueError, match="lora.checkpointing is for UNets of diffusers, and its network is a DiffusersSD3"):
        bank.enable_checkpointing()


def test_the_usual_ways_to_save_lose_most_of_it(tmp_path):
    """Why the file is as it is: diffusers' converter loses all attention layers, and without our header the scale is lost."""
    bank, found = saved(tmp_path, prompted())
    with bank.use("generator"):
        wanted = output(bank.denoiser.backbone.unet)
    save_file(convert_state_dict_to_diffusers(found), tmp_path / "converted.safetensors")
    save_file(found, tmp_path / "bare.safetensors")
    for name, lost in (("converted", True), ("bare", False)):
        pipe = pipeline()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors")
        assert (active(pipe.unet) < len(bank.layers) / 2) == lost and (output(pipe.unet) - wanted).abs().max() > 0.01
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 8.0


def test_merging_is_what_peft_merges():
    """A convolution's and a linear layer's merged weights are those of peft's merge."""
    bank, plain = banked(base()), base()
    lora.merge(plain.backbone, bank.config, tensors(bank, "generator"))
    for path, layer in bank.layers.items():
        wanted = layer.base_layer.weight + layer.get_delta_weight("generator")
        assert isinstance(plain.backbone.get_submodule(path), (nn.Linear, nn.Conv2d))
        assert torch.allclose(plain.backbone.get_submodule(path).weight, wanted, atol=1e-6)
