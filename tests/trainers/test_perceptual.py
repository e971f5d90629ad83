"""LPIPS: the package's own numbers from weights that are brought, and nothing run from a file that is not weights."""

import pickle
import socket
import warnings

import lpips
import pytest
import torch
import torchvision
from sentences import check_refused

from trainers import perceptual
from trainers.perceptual import Lpips

FILE = "alexnet-owt-7be5be79.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """AlexNet's weights, at random, as torchvision publishes them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / FILE
    torch.save(torchvision.models.alexnet().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def metric(weights):
    return Lpips("alex", str(weights))


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    def unreachable(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "create_connection", unreachable)


def images(channels=3, size=16):
    torch.manual_seed(1)
    return torch.rand(2, 3, channels, size, size) * 2 - 1


def test_equals_the_package(metric, weights):
    """It is lpips.LPIPS with the same backbone, on the images resized to 224."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    backbone = torch.load(weights, weights_only=True)
    with torch.no_grad():
        for name, p in reference.net.named_parameters():  # slice3.6.weight is features.6.weight
            p.copy_(backbone["features." + name.split(".", 1)[1]])
        x, y = images()
        big = [torch.nn.functional.interpolate(i, size=(224, 224), mode="bilinear") for i in (x, y)]
        torch.testing.assert_close(metric(x, y), reference(*big).flatten(), rtol=1e-6, atol=0)


def test_distance_is_zero_only_for_equal_images(metric):
    """One value a sample: 0 for the same image, positive and symmetric for others."""
    x, y = images()
    there, back = metric(x, y), metric(y, x)
    assert torch.equal(metric(x, x), torch.zeros(3)) and there.shape == (3,) and (there > 0).all()
    torch.testing.assert_close(there, back, rtol=1e-6, atol=0)


def test_one_channel_is_three_equal_ones(metric):
    """Grey images count as colour ones."""
    x, y = images(channels=1, size=8)
    assert torch.equal(metric(x, y), metric(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_gradient_reaches_the_image_alone(metric):
    """The image has a gradient; no weight asks for one, and it is in eval mode."""
    x, y = images()
    x.requires_grad_()
    metric(x, y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in metric.parameters()) and not any(m.training for m in metric.modules())


def test_weights_in_the_hub_cache_are_found(metric, weights, tmp_path):
    """What lies in torch's hub cache under its published name is used without being named."""
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / FILE).symlink_to(weights)
    x, y = images()
    assert torch.equal(Lpips("alex")(x, y), metric(x, y))


def test_missing_weights_name_the_file_to_bring(tmp_path, monkeypatch):
    """Without network and cache the sentence says which file, where to put it and how to name it."""
    monkeypatch.setattr(perceptual, "_download", lambda *_: None)
    with check_refused(FILE, str(tmp_path / "hub"), "--regression.weights"):
        Lpips("alex")
    with check_refused(str(tmp_path / "here.pth"), FILE, "--regression.weights"):
        Lpips("alex", str(tmp_path / "here.pth"))


def test_download_without_network_is_the_same_sentence(tmp_path):
    """A download that fails leaves nothing behind."""
    with check_refused(FILE, str(tmp_path / "hub"), "--regression.weights"):
        Lpips("alex")
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_unknown_backbone_is_refused():
    """The field, the value and the choices are named."""
    with check_refused("regression.backbone is squeeze", "vgg", "alex"):
        Lpips("squeeze")


OTHER_FILES = {"empty": b"", "text": b"two\nlines", "pickle": b"\x80\x02}q\x00.", "zip": b"PK\x03\x04"}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_file_of_another_sort_is_refused(tmp_path, content):
    """A file that holds no tensors is named, with the one that is wanted."""
    (tmp_path / "x.pth").write_bytes(content)
    with check_refused(str(tmp_path / "x.pth"), FILE):
        Lpips("alex", str(tmp_path / "x.pth"))


@pytest.mark.parametrize("change", [
    lambda state: {}, lambda state: list(state.values())[:1], lambda state: {**state, "features.3.weight": torch.zeros(1)},
    lambda state: {k: v for k, v in state.items() if k != "features.10.bias"}],
    ids=["no tensors", "a list", "another shape", "one missing"])
def test_weights_of_another_network_are_refused(tmp_path, weights, change):
    """Tensors that are not this backbone's are refused, with the file that is wanted."""
    torch.save(change(torch.load(weights, weights_only=True)), tmp_path / "x.pth")
    with check_refused(str(tmp_path / "x.pth"), FILE):
        Lpips("alex", str(tmp_path / "x.pth"))


@pytest.mark.parametrize("write", [lambda o, path: path.write_bytes(pickle.dumps(o)), torch.save], ids=["pickle", "torch.save"])
def test_hostile_pickle_does_not_run(tmp_path, write):
    """A file that would run a command when unpickled is refused, and has run nothing."""
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    write({"features.0.weight": Hostile()}, tmp_path / "x.pth")
    (tmp_path / "ran").unlink(missing_ok=True)
    with check_refused(str(tmp_path / "x.pth"), FILE):
        Lpips("alex", str(tmp_path / "x.pth"))
    assert not (tmp_path / "ran").exists()
