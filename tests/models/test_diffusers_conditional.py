"""Networks that are told a prompt: Stable Diffusion, SDXL, Stable Diffusion 3 and Sana behind the house's contract."""

import json

import pytest
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler,
                       SanaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel)

from models import hub
from models.conditioning import take, unconditional
from models.denoiser import Denoiser, ScoreModel
from models.diffusers_conditional import DiffusersPromptUNet, DiffusersSana, DiffusersSD3
from models.discriminator import DiscriminatorHead
from models.export import export
from models.hub import ModelError
from models.noise import Noise
from models.sampling import ddim, draw, few_step, guided
from models.schedules import DiscreteVP, Flow
from trainers.data import Batch
from trainers.dmd import DMD, DmdConfig

UNET = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
SDXL = UNET | dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
                   transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
                   projection_class_embeddings_input_dim=6 * 4 + 10)
SD3 = dict(sample_size=8, in_channels=16, out_channels=16, patch_size=2, num_layers=3, attention_head_dim=8, num_attention_heads=2, qk_norm="rms_norm",
           joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0,))
SANA = dict(sample_size=8, in_channels=32, out_channels=32, num_layers=3, attention_head_dim=8, num_attention_heads=2, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, patch_size=1, interpolation_scale=None, timestep_scale=0.5)
KINDS = {  # pipeline, network, its arguments, a scheduler, our backbone
    "sd": ("StableDiffusionPipeline", UNet2DConditionModel, UNET, PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
           skip_prk_steps=True, steps_offset=1), DiffusersPromptUNet),
    "sdxl": ("StableDiffusionXLPipeline", UNet2DConditionModel, SDXL, EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085,
             beta_end=0.012), DiffusersPromptUNet),
    "sd3": ("StableDiffusion3Pipeline", SD3Transformer2DModel, SD3, FlowMatchEulerDiscreteScheduler(shift=3.0), DiffusersSD3),
    "sana": ("SanaPipeline", SanaTransformer2DModel, SANA, DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
             flow_shift=3.0), DiffusersSana)}
UNETS, FLOWS = ("sd", "sdxl"), ("sd3", "sana")
TOKENS = 5
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(kind: str, seed: int = 0, **changes):
    """A network of diffusers' own class that does something, though nobody trained it."""
    torch.manual_seed(seed)
    return KINDS[kind][1](**{**KINDS[kind][2], **changes}).eval().requires_grad_(False)


def pipeline(folder, kind: str, network=None, scheduler=None):
    """What is read of a pipeline's folder, and the network in it. The text encoders and the autoencoder that it names are not there."""
    name, part, network = KINDS[kind][0], "unet" if kind in UNETS else "transformer", network or tiny(kind)
    network.save_pretrained(folder / part)
    (scheduler or KINDS[kind][3]).save_pretrained(folder / "scheduler")
    named = {part: ["diffusers", type(network).__name__], "scheduler": ["diffusers", "Any"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **named}))
    return network


def backbone(kind: str, seed: int = 0, **changes):
    """The house's backbone with such a network in it."""
    network = tiny(kind, seed, **changes)
    made = KINDS[kind][4](**KINDS[kind][4].from_diffusers(json.loads(json.dumps(dict(network.config)))))
    setattr(made, "unet" if kind in UNETS else "transformer", network)
    return made.eval()


def condition(kind: str, count: int, seed: int = 1) -> dict:
    random = torch.Generator().manual_seed(seed)
    given = {"prompt_embeds": torch.randn(count, TOKENS, 12, generator=random)}
    if kind in ("sdxl", "sd3"):
        given["pooled"] = torch.randn(count, 10, generator=random)
    if kind == "sdxl":
        given["time_ids"] = torch.tensor([[64.0, 64, 0, 3, 64, 64]]).repeat(count, 1)
    if kind == "sana":
        given["prompt_mask"] = torch.tensor([[1.0, 1, 1, 0, 0]]).repeat(count, 1)
    return given


def raw(kind: str, network, x, t, cond):
    """diffusers' own call. t: as its pipeline passes it, an index or 1000 sigma."""
    if kind == "sd":
        return network(x, t, cond["prompt_embeds"]).sample
    if kind == "sdxl":
        return network(x, t, cond["prompt_embeds"], added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}).sample
    if kind == "sd3":
        return network(hidden_states=x, timestep=t, encoder_hidden_states=cond["prompt_embeds"], pooled_projections=cond["pooled"]).sample
    prompt = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["prompt_mask"]}
    return network(x, **prompt, timestep=t * network.config.timestep_scale).sample


def latents(kind: str, count: int, seed: int = 2):
    return torch.randn(count, KINDS[kind][2]["in_channels"], 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_diffusers_own(kind):
    """The backbone computes what diffusers' class does, bit for bit, also at fractional levels, with features and without."""
    net, x, cond, t = backbone(kind), latents(kind, 3), condition(kind, 3), torch.tensor([0.0, 500.25, 999.0])
    wanted = raw(kind, net.unet if kind in UNETS else net.transformer, x, t, cond)
    output, features = net(x, t, cond, features=True)
    none, only = net(x, t, cond, features="only")
    assert none is None and torch.equal(net(x, t, cond), wanted) and torch.equal(output, wanted) and torch.equal(only, features)
    assert features.shape == (3, net.feature_channels, net.feature_resolution, net.feature_resolution)
    assert DiscriminatorHead(net.feature_channels, net.feature_resolution)(features).shape == (3,)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_middle(kind):
    """A UNet's features are its mid block's output; a transformer's are the tokens behind half of its blocks. "only" runs nothing behind them."""
    net, seen = backbone(kind), []
    if kind in UNETS:
        net.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        behind = [*net.unet.up_blocks, net.unet.conv_out]
    else:
        blocks = net.transformer.transformer_blocks
        side = net.feature_resolution
        blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output[1] if kind == "sd3" else output))
        behind = [*blocks[1:], net.transformer.proj_out]
    for block in behind:
        block.register_forward_hook(lambda *_: pytest.fail("what comes after the features was run"))
    found = net(latents(kind, 2), torch.full((2,), 3.0), condition(kind, 2), features="only")[1]
    wanted = seen[0] if kind in UNETS else seen[0].reshape(2, side, side, -1).permute(0, 3, 1, 2)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_checkpointing(kind):
    """Gradient reaches x, the prompt and every weight, and is the same, bit for bit, where blocks are computed twice to save memory."""
    def gradients(net):
        x, cond = latents(kind, 2).requires_grad_(), condition(kind, 2)
        cond["prompt_embeds"].requires_grad_()
        output, features = net.requires_grad_(True)(x, torch.full((2,), 400.0), cond, features=True)
        (output.square().sum() + features.sum()).backward()
        return {"x": x.grad, "prompt": cond["prompt_embeds"].grad, **{name: p.grad for name, p in net.named_parameters()}}
    plain, net = gradients(backbone(kind)), backbone(kind)
    net.enable_gradient_checkpointing()
    again = gradients(net)
    assert all(g is not None and g.isfinite().all() and torch.equal(g, again[name]) for name, g in plain.items())
    assert plain["x"].abs().sum() > 0 and plain["prompt"].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights(kind):
    """With weights in bfloat16, and buffers in float32 as a teacher has them, x0 is float32 and near that of float32."""
    schedule, prediction = (DiscreteVP.cosine(1000), "v") if kind in UNETS else (Flow(), "flow")
    x, cond, denoiser = latents(kind, 2), condition(kind, 2), Denoiser(backbone(kind), schedule, prediction)
    t = torch.tensor([schedule.t_max, 0.5 * schedule.t_max])
    wanted = denoiser(x, t, cond)
    for p in denoiser.parameters():
        p.data = p.data.bfloat16()
    found = denoiser(x, t, cond)
    assert found.dtype == torch.float32 and denoiser.backbone(x, t, cond).dtype == torch.bfloat16
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_sizes_are_told_in_float32():
    """SDXL's sizes keep their values under bfloat16 weights: 1023 is not 1024."""
    net = backbone("sdxl").bfloat16()
    told = net.given({**condition("sdxl", 1), "time_ids": torch.tensor([[1023, 1024, 0, 0, 1, 1]])}, 1, torch.bfloat16)
    assert told["time_ids"].tolist() == [[1023, 1024, 0, 0, 1, 1]] and told["pooled"].dtype == torch.bfloat16


FORMULAS = {  # of x0, by diffusers' name of the prediction: output, x_t, alpha, sigma
    "epsilon": lambda out, x, a, s: (x - s * out) / a, "v_prediction": lambda out, x, a, s: a * x - s * out, "sample": lambda out, x, a, s: out}


@pytest.mark.parametrize("prediction", FORMULAS)
@pytest.mark.parametrize("kind", UNETS)
def test_x0_of_a_pipeline_with_betas(tmp_path, kind, prediction):
    """x0 is the formula of the prediction, applied to the raw network at the level's index and with diffusers' own alpha."""
    scheduler = DDIMScheduler.from_config(KINDS[kind][3].config, prediction_type=prediction)
    unet, cond, x = pipeline(tmp_path, kind, scheduler=scheduler), condition(kind, 3), latents(kind, 3)
    index = torch.tensor([0, 400, 999])
    bar = scheduler.alphas_cumprod[index].view(-1, 1, 1, 1).double()
    wanted = FORMULAS[prediction](raw(kind, unet, x, index, cond), x, bar.sqrt(), (1 - bar).sqrt())
    torch.testing.assert_close(hub.load_denoiser(str(tmp_path))(x, index + 1.0, cond), wanted.float(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", FLOWS)
def test_x0_of_a_flow(tmp_path, kind):
    """x0 = x_t - sigma v, with v of the raw network, which is told 1000 sigma."""
    network, cond, x = pipeline(tmp_path, kind), condition(kind, 3), latents(kind, 3)
    t = torch.tensor([0.001, 0.37, 1.0])
    wanted = x - t.view(-1, 1, 1, 1) * raw(kind, network, x, 1000 * t, cond)
    torch.testing.assert_close(hub.load_denoiser(str(tmp_path))(x, t, cond), wanted, rtol=0, atol=1e-6)


def theirs(kind, network, scheduler, x, cond, steps):
    """diffusers' own loop."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} if kind in UNETS else {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}))
    for t in scheduler.timesteps:
        x = scheduler.step(raw(kind, network, x, t.expand(len(x)), cond), t, x).prev_sample
    return x


@pytest.mark.parametrize("kind, prediction", [("sd", "v_prediction"), ("sdxl", "epsilon"), ("sdxl", "v_prediction"), ("sd3", None), ("sana", None)])
def test_ddim_is_theirs(tmp_path, kind, prediction):
    """Eight steps of this house's DDIM on a loaded pipeline end where eight of diffusers' own scheduler do."""
    settings = dict(timestep_spacing="trailing", clip_sample=False, prediction_type=prediction, set_alpha_to_one=True)
    scheduler = DDIMScheduler.from_config(KINDS[kind][3].config, **settings) if kind in UNETS else FlowMatchEulerDiscreteScheduler(shift=3.0)
    network, x, cond = pipeline(tmp_path, kind, scheduler=scheduler), latents(kind, 2), condition(kind, 2)
    ours, wanted = ddim(hub.load_denoiser(str(tmp_path)), x, 8, cond), theirs(kind, network, scheduler, x, cond, 8)
    assert (ours - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


def test_a_flow_in_one_step(tmp_path):
    """From pure noise at t = 1, one step of a flow is x0 = x1 - v(x1, 1000), for a student as for DDIM."""
    network, x, cond = pipeline(tmp_path, "sd3"), latents("sd3", 2), condition("sd3", 2)
    denoiser, wanted = hub.load_denoiser(str(tmp_path)), x - raw("sd3", network, x, torch.full((2,), 1000.0), cond)
    torch.testing.assert_close(few_step(denoiser, x, [1.0], cond), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(ddim(denoiser, x, 1, cond), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_description(tmp_path, kind):
    """A pipeline is described without its network being made, with what it is told; the levels are its scheduler's."""
    pipeline(tmp_path, kind)
    said = hub.description(str(tmp_path))
    assert set(hub.PARTS) <= said.keys() and json.loads(json.dumps(said)) == said
    tokens = {"sd": 77, "sdxl": 77, "sd3": 333, "sana": 300}[kind]
    wanted = {"prompt_embeds": [tokens, 12], "pooled": [10], "time_ids": [6], "prompt_mask": [tokens]}
    keys = condition(kind, 1)
    assert said["conditions"] == {key: wanted[key] for key in keys} and said["latents"] is True and said["unconditional"] is True
    assert (said["resolution"], said["channels"], said["classes"]) == (8, KINDS[kind][2]["in_channels"], 0)
    assert (said["prediction"], said["sampler"]) == ("eps" if kind in UNETS else "flow", {"type": "ddim", "steps": 50})
    denoiser = hub.load_denoiser(str(tmp_path))
    assert hub.describe(denoiser).items() >= {key: said[key] for key in ("conditions", "latents", "schedule", "resolution")}.items()
    assert hub.describe(denoiser)["backbone"].items() >= said["backbone"].items()
    assert not denoiser.training and not any(p.requires_grad or p.is_meta or p.dtype != torch.float32 for p in denoiser.parameters())
    if kind in FLOWS:
        assert said["schedule"] == {"type": "Flow", "shift": 3.0}
    else:
        torch.testing.assert_close(denoiser.schedule.betas, torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)


PUBLISHED = {  # the config.json of each, and how many parameters it has
    "SD1.5": ("sd", dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
              down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3), 859_520_964),
    "SDXL": ("sdxl", dict(sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280],
             layers_per_block=2, transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time",
             addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, upcast_attention=None, time_cond_proj_dim=None,
             down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]), 2_567_463_684)}


@pytest.mark.parametrize("kind, config, count", PUBLISHED.values(), ids=PUBLISHED)
def test_published_networks(kind, config, count):
    """Of the published configurations, networks of the published size are made, which want the published conditions."""
    with torch.device("meta"):
        net = DiffusersPromptUNet(**DiffusersPromptUNet.from_diffusers({**config, "_class_name": "UNet2DConditionModel"}))
    assert sum(p.numel() for p in net.parameters()) == count
    wanted = {"prompt_embeds": [77, 768]} if kind == "sd" else {"prompt_embeds": [77, 2048], "pooled": [1280], "time_ids": [6]}
    assert net.conditions == wanted and (net.feature_channels, net.feature_resolution) == (1280, 8 if kind == "sd" else 32)


@pytest.mark.parametrize("kind", KINDS)
def test_own_format(tmp_path, kind):
    """A denoiser with such a network is saved and loaded as any other: same tensors, same description, same image, bit for bit."""
    pipeline(tmp_path / "pipe", kind)
    before = hub.load_denoiser(str(tmp_path / "pipe"))
    hub.save(tmp_path / "own", {**hub.describe(before), "sampler": {"type": "few_step", "timesteps": [before.schedule.t_max]}}, before.state_dict())
    after = hub.load_denoiser(str(tmp_path / "own"))
    assert hub.describe(after) == hub.describe(before)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    x, cond, t = latents(kind, 2), condition(kind, 2), torch.full((2,), before.schedule.t_max)
    assert torch.equal(after(x, t, cond), before(x, t, cond))


def test_guidance_in_one_pass(tmp_path):
    """SDXL guided by itself: one batch of both halves, the unconditional one of zeros under the same sizes."""
    unet, x, cond, w = pipeline(tmp_path, "sdxl"), latents("sdxl", 2), condition("sdxl", 2), 7.0
    denoiser, calls = hub.load_denoiser(str(tmp_path)), []
    denoiser.backbone.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    found = guided(denoiser, w)(x, torch.full((2,), 500.0), cond)
    zeros = {"prompt_embeds": torch.zeros(2, TOKENS, 12), "pooled": torch.zeros(2, 10), "time_ids": cond["time_ids"]}
    strong, weak = (raw("sdxl", unet, x, torch.full((2,), 499), c) for c in (cond, zeros))
    alpha, sigma = denoiser.schedule.alpha_sigma(500.0)
    torch.testing.assert_close(found, (x - sigma.float() * (weak + w * (strong - weak))) / alpha.float(), rtol=1e-4, atol=1e-4)
    assert len(calls) == 1 and len(calls[0][0]) == 4 and not torch.allclose(strong, weak)
    given = {"uncond": unconditional(cond, {key: value[:1] for key, value in zeros.items()})}
    assert torch.equal(guided(denoiser, w, **given)(x, torch.full((2,), 500.0), cond), found)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_a_dmd_update(kind):
    """The generator's losses and the fake score's, DMD2 with its discriminator, on networks that are told a prompt: gradient reaches all that
    should have it and nothing else, and a step of each changes the weights."""
    schedule, prediction = (DiscreteVP.cosine(1000), "v") if kind == "sdxl" else (Flow(3.0), "flow")
    start = [Denoiser(backbone(kind, seed), schedule, prediction) for seed in (0, 0, 0)]
    disc = DiscriminatorHead(start[0].backbone.feature_channels, start[0].backbone.feature_resolution)
    update = DMD.__new__(DMD)
    update.config, update.schedule, update.shape = DmdConfig(gan_weight=0.1), schedule, tuple(latents(kind, 1).shape[1:])
    update.timesteps, update.made = (schedule.t_max, schedule.t_max / 2), []
    update.teacher, update.generator, update.fake_score = start[0].requires_grad_(False), start[1].requires_grad_(True), ScoreModel(start[2], disc)
    cond = condition(kind, 2)
    update.guided_teacher = guided(update.teacher, 3.0, None if kind == "sdxl" else unconditional(cond, take(condition(kind, 1, seed=9), slice(1))))
    batch = Batch(latents(kind, 2), cond, Noise(0, 0, [0, 1]))

    update.fake_score.requires_grad_(False)
    losses = update.generator_loss(batch, depth=1)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["score_gap"] > 0 and losses["gan"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in update.generator.parameters())
    assert all(p.grad is None for module in (update.teacher, update.fake_score) for p in module.parameters())

    update.generator.zero_grad()
    update.fake_score.requires_grad_(True)
    before = [p.clone() for p in update.fake_score.parameters()]
    optimizer = torch.optim.AdamW(update.fake_score.parameters(), lr=1e-3)
    losses = update.fake_loss((batch, update.made[0]))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values()) and losses["denoising"] > 0 and losses["disc"] > 0
    assert all(p.grad is not None for p in update.fake_score.parameters()) and all(p.grad is None for p in update.generator.parameters())
    optimizer.step()
    assert not all(torch.equal(*pair) for pair in zip(before, update.fake_score.parameters()))


# --- what is refused -------------------------------------------------------------------------------------------------------


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def network(f, kind, **changes):
    edit(f / ("unet" if kind in UNETS else "transformer") / "config.json", **changes)


def scheduler(f, **changes):
    edit(f / "scheduler/scheduler_config.json", **changes)


DAMAGES = {
    "pipeline": ("sd", lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
                 ["a FluxPipeline of", *(kind[0] for kind in KINDS.values()), "DDPMPipeline"]),
    "inpainting": ("sd", lambda f: network(f, "sd", in_channels=9), ["makes 4 channels of 9"]),
    "another class": ("sd3", lambda f: network(f, "sd3", _class_name="FluxTransformer2DModel"), ["a FluxTransformer2DModel: SD3Transformer2DModel"]),
    "no size": ("sdxl", lambda f: network(f, "sdxl", sample_size=None), ["sample_size None"]),
    "odd size": ("sdxl", lambda f: network(f, "sdxl", sample_size=9), ["sample_size 9", "1 times"]),
    "patches": ("sd3", lambda f: network(f, "sd3", sample_size=9), ["patches of 2"]),
    "added": ("sd", lambda f: network(f, "sd", addition_embed_type="image"), ["addition_embed_type image"]),
    "half of sdxl": ("sdxl", lambda f: network(f, "sdxl", addition_time_embed_dim=None), ["needs projection_class"]),
    "blocks": ("sd", lambda f: network(f, "sd", mid_block_type="UNetMidBlock2DSimpleCrossAttn"), ["of UNetMidBlock2DSimpleCrossAttn"]),
    "distilled": ("sd", lambda f: network(f, "sd", time_cond_proj_dim=256), ["time_cond_proj_dim 256"]),
    "sprint": ("sana", lambda f: network(f, "sana", guidance_embeds=True), ["guidance_embeds"]),
    "unknown argument": ("sd3", lambda f: network(f, "sd3", surplus=1), ["surplus"]),
    "flow of a unet": ("sd", lambda f: FlowMatchEulerDiscreteScheduler().save_pretrained(f / "scheduler"), ["flow and EDM are not"]),
    "betas of a transformer": ("sd3", lambda f: DDIMScheduler().save_pretrained(f / "scheduler"), ["a DDIMScheduler", "FlowMatchEulerDiscreteScheduler"]),
    "solver of betas": ("sana", lambda f: scheduler(f, use_flow_sigmas=False), ["a DPMSolverMultistepScheduler", "use_flow_sigmas"]),
    "dynamic shift": ("sd3", lambda f: scheduler(f, use_dynamic_shifting=True), ["use_dynamic_shifting", "fixed shift"]),
    "inverted": ("sd3", lambda f: scheduler(f, invert_sigmas=True), ["invert_sigmas"]),
    "a pickle": ("sd", lambda f: (f / "unet" / WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"), ["never read"]),
    "shards": ("sd3", lambda f: (f / f"transformer/{WEIGHTS}.index.json").write_text("{}"), ["several files"]),
    "no weights": ("sd3", lambda f: (f / "transformer" / WEIGHTS).unlink(), ["there is no transformer/"]),
}


@pytest.mark.parametrize("kind, damage, said", DAMAGES.values(), ids=DAMAGES)
def test_refusals(tmp_path, kind, damage, said):
    """What is missing, damaged or of another kind is refused in one sentence that names the folder or the setting."""
    pipeline(tmp_path, kind)
    damage(tmp_path)
    with pytest.raises(ModelError) as refused:
        hub.load_denoiser(str(tmp_path))
    message = str(refused.value)
    assert "\n" not in message and all(part in message for part in said), message


@pytest.mark.parametrize("damage", [lambda c: None, lambda c: {}, lambda c: {**c, "pooled": c["pooled"][:1]}, lambda c: {**c, "pooled": c["pooled"][:, :3]},
                                    lambda c: {k: v for k, v in c.items() if k != "time_ids"}], ids=["none", "empty", "rows", "width", "no sizes"])
def test_a_condition_that_does_not_fit(damage):
    """A condition that is missing or of another shape is refused in one sentence, which says what the network wants."""
    with pytest.raises(ValueError, match="this network wants prompt_embeds, pooled, time_ids for each image"):
        backbone("sdxl")(latents("sdxl", 2), torch.zeros(2), damage(condition("sdxl", 2)))


def test_longer_prompts_are_taken():
    """The number of tokens is free, as it is in diffusers."""
    cond = condition("sd", 2)
    longer = {"prompt_embeds": cond["prompt_embeds"].repeat(1, 3, 1)}
    net, x = backbone("sd"), latents("sd", 2)
    assert torch.equal(net(x, torch.zeros(2), longer), raw("sd", net.unet, x, torch.zeros(2), longer))


def test_classes_are_refused():
    with pytest.raises(ValueError, match="label_dim is 10"):
        DiffusersSana(8, 32, label_dim=10)


def test_no_export(tmp_path):
    """An exported pipeline takes no prompts: such a model is not exported."""
    pipeline(tmp_path / "pipe", "sd")
    with pytest.raises(ModelError, match="told prompts"):
        export(str(tmp_path / "pipe"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels, wanted", [(1, 1.0), (3, 1.0), (4, 3.0), (16, 3.0)])
def test_latents_of_any_channels_are_not_clipped(channels, wanted):
    """What has four channels or more is drawn without bounds."""
    denoiser = Bright()
    about = {"channels": channels, "resolution": 2, "classes": 0, "sampler": {"type": "few_step", "timesteps": [1.0]}}
    assert (draw(denoiser, about, range(2), 1)[0] == wanted).all()


class Bright(torch.nn.Module):
    """A denoiser whose images are all 3."""

    def __init__(self):
        super().__init__()
        self.schedule, self.weight = Flow(), torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x_t, t, cond):
        return torch.full_like(x_t, 3.0)
