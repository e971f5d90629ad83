"""The adapter round AutoencoderKL: images in [-1, 1] outside, EDM2's conventions inside."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import save_autoencoder
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file, save_file

from models.autoencoder import Autoencoder, Normalisation
from models.hub import ModelError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pixels():
    """Bytes, as floats."""
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()


def refusal(*arguments, **settings):
    """The one-line message with which an autoencoder is refused."""
    with pytest.raises(ModelError) as caught:
        Autoencoder(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_encode_is_diffusers_encode_of_bytes_over_255(tiny_autoencoder, pixels):
    """Images in [-1, 1] give the posterior that diffusers gives for x / 255, whatever the batch."""
    mean, std = Autoencoder(tiny_autoencoder, batch=2).encode(pixels / 127.5 - 1)
    wanted = AutoencoderKL.from_pretrained(tiny_autoencoder).encode(pixels / 255).latent_dist
    assert mean.shape == std.shape == (5, 4, 4, 4) and mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, wanted.std, rtol=1e-4, atol=1e-5)
    assert std.min() > 0 and mean.std() > 0.01


def test_decode_is_diffusers_decode(tiny_autoencoder):
    """Normalised latents give diffusers' images, brought from [0, 1] to [-1, 1] and clamped."""
    raw = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * 4
    autoencoder = Autoencoder(tiny_autoencoder, batch=2)
    images = autoencoder.decode(autoencoder.normalize(raw))
    wanted = AutoencoderKL.from_pretrained(tiny_autoencoder).decode(raw).sample * 2 - 1
    assert images.shape == (5, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    torch.testing.assert_close(images, wanted.clamp(-1, 1), rtol=1e-3, atol=1e-3)
    assert (wanted.abs() > 1).any() and (wanted.abs() < 1).any()  # some are clamped, and some are not


def test_latents_of_the_published_statistics_become_standard():
    """Raw latents with EDM2's means and deviations get mean 0 and standard deviation 0.5 in each channel."""
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    unit = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    found = Normalisation().normalize(unit * std.view(-1, 1, 1) + mean.view(-1, 1, 1))
    torch.testing.assert_close(found, unit / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalisation", [Normalisation(), Normalisation((1.0, 0.0, -3.0, 2.0), (2.0, 1.0, 0.5, 9.0), 0.25, 1.5)])
def test_normalisation_is_inverted(normalisation):
    """denormalize undoes normalize, and the other way round."""
    x = 5 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(normalisation.denormalize(normalisation.normalize(x)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalisation.normalize(normalisation.denormalize(x)), x, rtol=1e-5, atol=1e-5)


def test_network_is_frozen(tiny_autoencoder, pixels):
    """It is in eval mode, nothing in it asks for a gradient, and none flows through it."""
    autoencoder = Autoencoder(tiny_autoencoder)
    assert not autoencoder.network.training and not any(p.requires_grad for p in autoencoder.network.parameters())
    assert not autoencoder.encode((pixels / 127.5 - 1).requires_grad_())[0].requires_grad


def test_weights_hash_is_of_the_weights(tiny_autoencoder, tmp_path):
    """A copy has the same hash; another seed, or one value changed, another."""
    shutil.copytree(tiny_autoencoder, tmp_path / "copy")
    shutil.copytree(tiny_autoencoder, tmp_path / "changed")
    tensors = load_file(tmp_path / "changed" / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, tmp_path / "changed" / WEIGHTS, {"format": "pt"})
    other = save_autoencoder(tmp_path / "other", seed=1)
    found = [Autoencoder(str(path)).weights_hash() for path in (tiny_autoencoder, tmp_path / "copy", tmp_path / "changed", other)]
    assert found[0] == found[1] and len(set(found)) == 3


def test_tensors_come_back_where_they_were(tiny_autoencoder, device, pixels):
    """The network's device is its own affair."""
    autoencoder = Autoencoder(tiny_autoencoder, device)
    mean, std = autoencoder.encode(pixels / 127.5 - 1)
    assert mean.device == std.device == autoencoder.decode(mean).device == pixels.device


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_missing_folder_is_refused(path):
    """A path that is not there is named."""
    assert path in refusal(path) and "no such folder" in refusal(path)


def test_unreachable_hub_id_is_refused(monkeypatch):
    """An id that cannot be fetched is named."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nobody/no-autoencoder" in refusal("nobody/no-autoencoder")


def test_another_model_is_refused(tmp_path):
    """A folder of diffusers with something else in it is refused by what it is."""
    UNet2DModel(8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                norm_num_groups=4).save_pretrained(tmp_path)
    assert "UNet2DModel" in refusal(str(tmp_path)) and "AutoencoderKL" in refusal(str(tmp_path))


def damage(folder: Path, kind: str) -> None:
    weights, config = folder / WEIGHTS, folder / "config.json"
    tensors = load_file(weights)
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "pickled":
        weights.unlink()
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    elif kind == "tensor missing":
        save_file(dict(list(tensors.items())[1:]), weights, {"format": "pt"})
    elif kind == "tensor too many":
        save_file({**tensors, "extra.weight": torch.zeros(1)}, weights, {"format": "pt"})
    elif kind == "other shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 8, 16, 16]}))
    elif kind == "no config":
        config.unlink()
    else:
        config.write_text("{no")


@pytest.mark.parametrize("kind", ["truncated", "pickled", "tensor missing", "tensor too many", "other shape", "no config", "config is no JSON"])
def test_damaged_folder_is_refused(tiny_autoencoder, tmp_path, kind):
    """What does not hold all the weights of its description, as safetensors, is refused by name."""
    shutil.copytree(tiny_autoencoder, tmp_path / "model")
    damage(tmp_path / "model", kind)
    assert str(tmp_path / "model") in refusal(str(tmp_path / "model"))


@pytest.mark.parametrize("config, words", [
    ({"latent_channels": 8}, ("8 channels", "4")), ({"in_channels": 1, "out_channels": 1}, ("1 channels", "3"))])
def test_autoencoder_of_another_form_is_refused(tmp_path, config, words):
    """Constants for four channels fit no other latents, and images have three channels."""
    message = refusal(save_autoencoder(tmp_path, **config))
    assert all(word in message for word in (str(tmp_path), *words))
