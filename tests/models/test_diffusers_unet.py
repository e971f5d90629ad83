"""diffusers' networks behind the house's contract, and its pipelines' folders as teachers."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from models import hub
from models.denoiser import Denoiser
from models.diffusers_unet import DiffusersUNet
from models.hub import ModelError
from models.sampling import ddim
from models.schedules import DiscreteVP
from trainers.pairs import weights_hash

BLOCKS = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16),
              layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(seed: int = 0, **changes) -> UNet2DModel:
    """A UNet2DModel that does something, though nobody trained it."""
    torch.manual_seed(seed)
    return UNet2DModel(**{"sample_size": 8, "in_channels": 3, "out_channels": 3, **BLOCKS, **changes}).eval().requires_grad_(False)


def tiny_backbone(seed: int = 0, **changes) -> DiffusersUNet:
    torch.manual_seed(seed)
    return DiffusersUNet(**{"img_resolution": 8, "img_channels": 3, **BLOCKS, **changes}).eval().requires_grad_(False)


def pipeline(folder, unet: UNet2DModel | None = None, scheduler=None, **settings) -> UNet2DModel:
    """A DDPMPipeline's folder, and the network in it."""
    unet = unet or tiny_unet()
    DDPMPipeline(unet, scheduler or DDPMScheduler(**settings)).save_pretrained(folder)
    return unet


def edit(file, **changes):
    """Change a JSON file; None removes a key."""
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def retensor(file, **changes):
    """Change a safetensors file; None removes a tensor."""
    save_file({key: value for key, value in {**load_file(file), **changes}.items() if value is not None}, file)


def test_the_network_is_diffusers_own():
    """The backbone computes what UNet2DModel does, bit for bit, also at fractional levels; its features are the mid block's output."""
    net = tiny_backbone()
    x, t, seen = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 1.5, 500.25, 999.0]), []
    net.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    wanted = net.unet(x, t).sample
    output, features = net(x, t, features=True)
    none, only = net(x, t, features="only")
    assert none is None and torch.equal(net(x, t), wanted) and torch.equal(output, wanted)
    assert torch.equal(features, seen[0]) and torch.equal(only, seen[0])
    assert features.shape == (4, net.feature_channels, net.feature_resolution, net.feature_resolution) == (4, 16, 4, 4)


def test_only_features_stop_at_the_middle():
    """Where only features are asked for, no block behind them is run."""
    net, ran = tiny_backbone(), []
    for block in (*net.unet.up_blocks, net.unet.conv_out):
        block.register_forward_hook(lambda *_: ran.append(1))
    net(torch.randn(1, 3, 8, 8), torch.tensor([3.0]), features="only")
    assert not ran
    net(torch.randn(1, 3, 8, 8), torch.tensor([3.0]))
    assert len(ran) == len(net.unet.up_blocks) + 1


def test_bfloat16_weights():
    """In bfloat16 the output is near that of float32, and the level is told in float32: neighbouring levels above 256 still differ."""
    net, x = tiny_backbone(), torch.randn(2, 3, 8, 8)
    wanted = net(x, torch.tensor([998.0, 999.0]))
    output = net.bfloat16()(x, torch.tensor([998.0, 999.0]))
    assert output.dtype == torch.bfloat16 and (output.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    levels = net.unet.time_proj(torch.tensor([998.0, 999.0]))
    assert levels.dtype == torch.float32 and not torch.equal(levels[0], levels[1])
    assert not torch.equal(*net.embedding(torch.tensor([998.0, 999.0]), None, torch.bfloat16))


def test_labels_are_rows_of_the_class_embedding():
    """A label adds its own row; -1, and no condition at all, add the null class's, the last, where the network has one."""
    x, t = torch.randn(3, 3, 8, 8), torch.full((3,), 7.0)
    net = tiny_backbone(label_dim=4, null_class=True)
    assert net.unet.config.num_class_embeds == 5
    output = net(x, t, {"labels": torch.tensor([0, 3, -1])})
    assert torch.equal(output, net.unet(x, t, class_labels=torch.tensor([0, 3, 4])).sample)
    assert torch.equal(net(x, t), net.unet(x, t, class_labels=torch.tensor([4, 4, 4])).sample) and not torch.allclose(output, net(x, t))


@pytest.mark.parametrize("cond", [None, {"labels": torch.tensor([1, -1])}], ids=["none", "some"])
def test_no_label_needs_a_null_class(cond):
    """A network whose classes are all real refuses an image without label."""
    with pytest.raises(ValueError, match="4 classes and none that means no label"):
        tiny_backbone(label_dim=4)(torch.randn(2, 3, 8, 8), torch.zeros(2), cond)


def test_both_predictions_at_once():
    """A network may return twice the channels: x0 and eps side by side."""
    net = tiny_backbone(out_channels=6)
    assert net(torch.randn(2, 3, 8, 8), torch.zeros(2)).shape == (2, 6, 8, 8) and net.config["out_channels"] == 6


@pytest.mark.parametrize("setting", [{"time_embedding_type": "fourier"}, {"class_embed_type": "timestep"}, {"center_input_sample": True},
                                     {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}], ids=str)
def test_unknown_kinds_of_network(setting):
    """Settings that make it another network are refused by their name."""
    with pytest.raises(ValueError, match="not supported"):
        tiny_backbone(**setting)


@pytest.mark.parametrize("network", [{}, {"label_dim": 3, "null_class": True}, {"out_channels": 6}], ids=str)
def test_own_format(tmp_path, network):
    """A denoiser with such a network is saved and loaded as any other: same tensors, same description, same image, bit for bit."""
    before = Denoiser(tiny_backbone(**network), DiscreteVP.cosine(16), "v")
    said = {**hub.describe(before), "sampler": {"type": "ddim", "steps": 4}}
    hub.save(tmp_path, said, before.state_dict())
    after = hub.load_denoiser(str(tmp_path))
    assert hub.describe(after) == hub.describe(before) == {k: v for k, v in hub.description(str(tmp_path)).items() if k != "sampler"}
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 15.0]), {"labels": torch.tensor([-1, 2])}
    assert torch.equal(after.backbone(*inputs), before.backbone(*inputs))


FORMULAS = {  # of x0, by diffusers' name of the prediction: output, x_t, alpha, sigma
    "epsilon": lambda out, x, a, s: (x - s * out) / a, "v_prediction": lambda out, x, a, s: a * x - s * out, "sample": lambda out, x, a, s: out}


@pytest.mark.parametrize("prediction", FORMULAS)
def test_x0_of_a_pipeline(tmp_path, prediction):
    """x0 is the formula of the prediction, applied to the raw network at the level's index and with diffusers' own alpha."""
    unet = pipeline(tmp_path, prediction_type=prediction)
    denoiser, x = hub.load_denoiser(str(tmp_path)), torch.randn(3, 3, 8, 8)
    index = torch.tensor([0, 400, 999])
    bar = DDPMScheduler(prediction_type=prediction).alphas_cumprod[index].view(-1, 1, 1, 1).double()
    wanted = FORMULAS[prediction](unet(x, index).sample, x, bar.sqrt(), (1 - bar).sqrt())
    torch.testing.assert_close(denoiser(x, index + 1.0), wanted.float(), rtol=2e-4, atol=2e-5)  # theirs are float32 products of a thousand


def theirs(unet, latents, steps, **settings):
    """diffusers' own DDIM loop."""
    scheduler, x = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **settings), latents
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("settings", [
    {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"prediction_type": "sample"},
    {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.01},
], ids=str)
def test_ddim_is_theirs(tmp_path, settings):
    """Eight steps of this house's DDIM on a loaded pipeline end where eight of diffusers' scheduler do."""
    unet = pipeline(tmp_path, scheduler=DDIMScheduler(**settings))
    latents = torch.randn(2, 3, 8, 8)
    ours, wanted = ddim(hub.load_denoiser(str(tmp_path)), latents, 8), theirs(unet, latents, 8, **settings)
    assert (ours - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


def test_description(tmp_path):
    """A pipeline is described in the words of a model of this house, and `build` makes its network of them."""
    pipeline(tmp_path, tiny_unet(in_channels=1, out_channels=1, num_class_embeds=5), num_train_timesteps=20)
    said = hub.description(str(tmp_path))
    assert set(hub.PARTS) <= said.keys() and json.loads(json.dumps(said)) == said
    assert (said["resolution"], said["channels"], said["classes"], said["prediction"]) == (8, 1, 5, "eps")
    assert said["sampler"] == {"type": "ddim", "steps": 20} and hub.build(said).schedule.t_max == 20
    denoiser = hub.load_denoiser(str(tmp_path))
    assert hub.describe(denoiser)["backbone"].items() >= said["backbone"].items()
    assert not denoiser.training and not any(p.requires_grad or p.dtype != torch.float32 for p in denoiser.parameters())


def test_flat_folders_and_old_names(tmp_path):
    """All files in one folder, and attention weights under the names that they had in 2022, make the same network."""
    pipeline(tmp_path / "new")
    (tmp_path / "old").mkdir()
    for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(tmp_path / "new" / file, tmp_path / "old")
    tensors, names = load_file(tmp_path / "new/unet" / WEIGHTS), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    new, old = (hub.load_denoiser(str(tmp_path / name)).state_dict() for name in ("new", "old"))
    assert all(torch.equal(value, old[name]) for name, value in new.items()) and len(new) == len(old)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler], ids=lambda s: s.__name__)
def test_the_scheduler_is_only_its_betas(tmp_path, scheduler):
    """Whatever sampler a pipeline was saved with, the network's levels are those of its betas."""
    pipeline(tmp_path, scheduler=scheduler(beta_start=0.0002, beta_end=0.03, num_train_timesteps=100))
    schedule = hub.load_denoiser(str(tmp_path)).schedule
    torch.testing.assert_close(schedule.betas, torch.linspace(0.0002, 0.03, 100, dtype=torch.float64))


def test_weights_file(tmp_path):
    """The weights of a model are one file, which pairs are tied to, in each format."""
    pipeline(tmp_path / "pipe")
    denoiser = hub.load_denoiser(str(tmp_path / "pipe"))
    hub.save(tmp_path / "run/model", {**hub.describe(denoiser), "sampler": {"type": "ddim", "steps": 4}}, denoiser.state_dict())
    assert hub.weights_file(str(tmp_path / "pipe")) == tmp_path / "pipe/unet" / WEIGHTS
    assert hub.weights_file(str(tmp_path / "run")) == tmp_path / "run/model/model.safetensors"
    before = weights_hash(str(tmp_path / "pipe"))
    pipeline(tmp_path / "pipe", tiny_unet(1))
    assert weights_hash(str(tmp_path / "pipe")) != before != weights_hash(str(tmp_path / "run"))


def refusal(path) -> str:
    with pytest.raises(ModelError) as refused:
        hub.load_denoiser(str(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


DAMAGES = {
    "no such network": (lambda f: shutil.rmtree(f / "unet"), "there is no unet/config.json"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "there is no scheduler/scheduler_config.json"),
    "a pickle": (lambda f: (f / "unet" / WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"), "a pickle, .bin, is never read"),
    "more networks": (lambda f: edit(f / "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]), "a LDMPipeline of"),
    "another network": (lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"), "UNet2DModel is what is supported"),
    "variances": (lambda f: edit(f / "unet/config.json", out_channels=6), "learned variances are not supported"),
    "no square": (lambda f: edit(f / "unet/config.json", sample_size=[8, 16]), "sample_size"),
    "no size": (lambda f: edit(f / "unet/config.json", sample_size=None), "sample_size"),
    "fourier": (lambda f: edit(f / "unet/config.json", time_embedding_type="fourier"), "time_embedding_type"),
    "flow prediction": (lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="flow_prediction"), "flow_prediction"),
    "betas": (lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"), "sigmoid"),
    "eps of noise": (lambda f: edit(f / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "epsilon says nothing"),
    "edm": (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"), "flow and EDM are not"),
    "no json": (lambda f: (f / "scheduler/scheduler_config.json").write_text("[3]"), "not a configuration"),
    "cut off": (lambda f: (f / "unet" / WEIGHTS).write_bytes((f / "unet" / WEIGHTS).read_bytes()[:900]), "does not fit config.json"),
    "wider": (lambda f: edit(f / "unet/config.json", block_out_channels=[8, 32]), "does not fit config.json"),
    "a tensor too many": (lambda f: retensor(f / "unet" / WEIGHTS, surplus=torch.ones(1)), "unexpected keys: surplus"),
    "a tensor missing": (lambda f: retensor(f / "unet" / WEIGHTS, **{"conv_out.bias": None}), "conv_out.bias"),
    "deeper": (lambda f: edit(f / "unet/config.json", layers_per_block=2), "does not fit config.json"),
}


@pytest.mark.parametrize("damage, said", DAMAGES.values(), ids=DAMAGES)
def test_refusals(tmp_path, damage, said):
    """What is missing, damaged or of another kind is refused in one sentence that names the folder."""
    pipeline(tmp_path)
    damage(tmp_path)
    message = refusal(tmp_path)
    assert said in message and str(tmp_path) in message


def test_flow_is_refused(tmp_path):
    """A flow scheduler has no betas."""
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    assert "its scheduler is a FlowMatchEulerDiscreteScheduler" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "runs/typo"])
def test_a_hub_id_out_of_reach(tmp_path, monkeypatch, name):
    """Without the hub, a model's id is refused in one sentence, for a folder that was meant and for an id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(name)
    assert name in message and "no such folder here" in message
    (tmp_path / "runs").mkdir()
    assert ("there is no model there" in refusal(name)) == name.startswith("runs")


def test_a_hub_id(tmp_path, monkeypatch):
    """An id is fetched, no pickle with it, and its weights only if its kind is supported; then it is read as a folder."""
    fetched, cache = [], str(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: fetched.append((name, *allow_patterns)) or cache)
    unet = pipeline(tmp_path / "cache")
    loaded = hub.load_denoiser("owner/name").state_dict()
    assert torch.equal(loaded["backbone.unet.conv_in.weight"], unet.state_dict()["conv_in.weight"])
    assert fetched[0] == ("owner/name", "*.json") and all(p.endswith((".json", ".safetensors")) for call in fetched for p in call[1:])
    assert hub.weights_file("owner/name") == tmp_path / "cache/unet" / WEIGHTS
    fetched.clear()
    edit(tmp_path / "cache/unet/config.json", _class_name="UNet2DConditionModel")
    assert "UNet2DModel is what is supported" in refusal("owner/name") and fetched == [("owner/name", "*.json")]
