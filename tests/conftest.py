import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from models import hub
from models.denoiser import Denoiser
from models.edm2_unet import EDM2UNet, LogVar
from models.schedules import EDM

HOUSE = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_denoiser(seed: int = 0, **network) -> Denoiser:
    """An EDM2 network for 8x8 digits that does something at every noise level, though nobody trained it."""
    torch.manual_seed(seed)
    settings = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16) | network
    denoiser = Denoiser(EDM2UNet(8, 1, 10, **settings), EDM(sigma_data=0.75), "edm", LogVar())
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.5)
    return denoiser


def save_teacher(folder: Path, denoiser: Denoiser, unconditional: bool = True) -> Path:
    hub.save(folder / "model", {**hub.describe(denoiser), "sampler": {"type": "heun", "steps": 3}, "unconditional": unconditional}, denoiser.state_dict())
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A run's folder with an untrained teacher."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), tiny_denoiser())


@pytest.fixture
def fresh_accelerator(monkeypatch):
    """accelerate keeps its state in class attributes and in the environment: give each test its own."""
    for key in [k for k in os.environ if k.startswith("ACCELERATE_")]:
        monkeypatch.delenv(key)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def run(*command: str, cwd: Path = HOUSE, check: bool = True, timeout: int = 600) -> subprocess.CompletedProcess:
    """A command as a user types it, from the environment that runs the tests."""
    scripts = str(Path(sys.executable).parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"PATH": scripts + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def launch(config: str, trainer: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """accelerate launch --config_file accelerate_configs/CONFIG [flags] trainers/TRAINER ...; flags before a "--" go to the launcher."""
    flags = arguments[:arguments.index("--")] if "--" in arguments else ()
    rest = arguments[len(flags) + 1:] if flags else arguments
    return run("accelerate", "launch", "--config_file", HOUSE / "accelerate_configs" / config, "--main_process_port", "0", *flags,
               HOUSE / "trainers" / trainer, *rest, **options)


def save_autoencoder(folder: Path, seed: int = 0, **config) -> str:
    """A tiny AutoencoderKL that nobody trained: 8 pixels to a latent of 4 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = dict(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    AutoencoderKL(**{**blocks, "norm_num_groups": 4, "latent_channels": 4, **config}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"))
