"""Saved models: what is written is what is read, and what cannot be read is refused in one line."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from models import hub
from models.denoiser import Denoiser
from models.edm2_unet import EDM2UNet, LogVar
from models.hub import ModelError, load_denoiser
from models.schedules import EDM, CosineVP, DiscreteVP, Flow

SCHEDULES = {"edm": (EDM(0.01, 50.0, 5.0, 0.75), "edm"), "cosine": (CosineVP(20.0), "v"), "exact": (CosineVP(), "x0"),
             "discrete": (DiscreteVP(torch.linspace(1e-4, 0.02, 50), zero_terminal_snr=True), "v"), "flow": (Flow(3.0), "flow")}


def tiny(schedule=EDM(), prediction="edm", logvar=True):
    torch.manual_seed(0)
    net = EDM2UNet(8, 1, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8,
                   clip_act=None)
    denoiser = Denoiser(net, schedule, prediction, LogVar(16) if logvar else None)
    for name, p in denoiser.named_parameters():
        if name.endswith("gain"):
            p.data.fill_(0.5)
    return denoiser


def save(folder, denoiser=None, sampler={"type": "heun", "steps": 3}, **changes):
    denoiser = denoiser or tiny()
    hub.save(folder, {**hub.describe(denoiser), "sampler": sampler, **changes}, denoiser.state_dict())
    return denoiser


@pytest.mark.parametrize("logvar", [False, True])
@pytest.mark.parametrize("schedule, prediction", SCHEDULES.values(), ids=SCHEDULES)
def test_round_trip(tmp_path, schedule, prediction, logvar):
    """A model that was saved and loaded has the same tensors, buffers and schedule, and gives the same image, bit for bit."""
    before = save(tmp_path, tiny(schedule, prediction, logvar)).eval()
    after = load_denoiser(str(tmp_path))
    assert after.state_dict().keys() == before.state_dict().keys() and len(list(after.buffers())) == (4 if logvar else 2)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items())
    assert after.prediction == prediction and after.schedule.config() == schedule.config()
    x_t, t = torch.randn(2, 1, 8, 8), schedule.time(torch.tensor([0.3, 0.9]))
    assert torch.equal(after(x_t, t, {"labels": torch.tensor([-1, 2])}), before(x_t, t, {"labels": torch.tensor([-1, 2])}))
    assert (after.logvar is not None) == logvar


def test_loaded_model_is_frozen(tmp_path):
    """A loaded model is in eval mode, and none of its parameters wants a gradient."""
    save(tmp_path)
    after = load_denoiser(str(tmp_path))
    assert not any(m.training for m in after.modules()) and not any(p.requires_grad for p in after.parameters())


def test_a_run_and_its_model_are_the_same(tmp_path):
    """A run's folder and its model's own name the same model, and its description is what was saved."""
    save(tmp_path / "model")
    assert hub.model_folder(str(tmp_path)) == hub.model_folder(str(tmp_path / "model")) == tmp_path / "model"
    found = hub.description(str(tmp_path))
    assert found["sampler"] == {"type": "heun", "steps": 3}
    assert (found["resolution"], found["channels"], found["classes"]) == (8, 1, 3)


def test_description_builds_the_same_network():
    """What `describe` says, through JSON, is what `build` makes: it describes itself in the same words."""
    said = json.loads(json.dumps(hub.describe(tiny())))
    built = hub.build(said)
    assert hub.describe(built) == said
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in tiny().state_dict().items()}


def test_save_replaces_whole_files(tmp_path):
    """Saving over a model leaves the new one and nothing half-written beside it."""
    save(tmp_path)
    other = tiny()
    other.backbone.out_gain.data.fill_(3.0)
    save(tmp_path, other)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["backbone.out_gain"].item() == 3


def refusal(path):
    """The message with which a model is refused: one line that says where."""
    with pytest.raises(ModelError) as refused:
        load_denoiser(str(path))
    message = str(refused.value)
    assert "\n" not in message and message.strip()
    return message


@pytest.mark.parametrize("missing", ["everything", "config.json", "model.safetensors"])
def test_missing_model(tmp_path, missing):
    """A folder that is not there, or lacks one of its two files, is refused by its path."""
    if missing != "everything":
        save(tmp_path / "run")
        (tmp_path / "run" / missing).unlink()
    assert str(tmp_path / "run") in refusal(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"backbone": "EDM2UNet"}', b"\xff\xfe"], ids=repr)
def test_broken_description(tmp_path, content):
    """A config.json that is not JSON, not text or not a model's description is refused by its path."""
    save(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["backbone", "schedule", "prediction", "logvar", "resolution", "channels", "classes", "sampler"])
def test_incomplete_description(tmp_path, key):
    """A description that lacks any of its parts is refused, and the message names the part."""
    save(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    del said[key]
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert key in refusal(tmp_path)


@pytest.mark.parametrize("part", ["backbone", "schedule"])
def test_unknown_type(tmp_path, part):
    """A network or schedule of a type that is not known here is refused by its name."""
    save(tmp_path, **{part: {"type": "os.system"}})
    assert "os.system" in refusal(tmp_path)


@pytest.mark.parametrize("changes", [
    {"backbone": {**hub.describe(tiny())["backbone"], "depth": 3}}, {"backbone": {"type": "EDM2UNet"}},
    {"schedule": {"type": "EDM", "sigma": 3}}, {"logvar": {"width": 3}}, {"prediction": "epsilon"},
    {"schedule": {"type": "Flow"}},
], ids=["unknown-argument", "missing-argument", "schedule-argument", "logvar-argument", "prediction", "edm-on-flow"])
def test_description_of_nothing_that_can_be_built(tmp_path, changes):
    """A description from which no network can be built is refused."""
    save(tmp_path, **changes)
    assert "no network can be built" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(tmp_path, share):
    """A model.safetensors that was cut off anywhere is refused."""
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name, damage", [
    ("backbone.out_gain", lambda tensors: tensors.pop("backbone.out_gain")),
    ("surplus", lambda tensors: tensors.update(surplus=torch.ones(1))),
    ("backbone.out_gain", lambda tensors: tensors.update({"backbone.out_gain": torch.ones(2)})),
], ids=["missing", "extra", "shape"])
def test_weights_of_another_network(tmp_path, name, damage):
    """Weights with a tensor missing, left over or of another shape are refused, and the message names the tensor."""
    denoiser = tiny()
    tensors = denoiser.state_dict()
    damage(tensors)
    hub.save(tmp_path, {**hub.describe(denoiser), "sampler": {"type": "heun", "steps": 3}}, tensors)
    message = refusal(tmp_path)
    assert "model.safetensors" in message and name in message


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [
    lambda bomb, file: file.write_bytes(pickle.dumps(bomb)), lambda bomb, file: torch.save({"w": bomb}, file),
], ids=["pickle", "torch"])
def test_nothing_is_unpickled(tmp_path, write):
    """Weights that are really a pickle are refused, and no code in them runs."""
    save(tmp_path)
    write(Bomb(tmp_path / "ran"), tmp_path / "model.safetensors")
    assert "model.safetensors" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()
