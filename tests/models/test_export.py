"""Exported folders, loaded and sampled by diffusers alone, make the images that this house's samplers make."""

import ast
import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run, tiny_denoiser
from diffusers import DDIMPipeline, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from models import export as module
from models import hub
from models.conditioning import class_labels
from models.denoiser import Denoiser
from models.diffusers_unet import DiffusersUNet
from models.edm2_unet import EDM2UNet
from models.export import SOURCES, _bound, _statements, _used, bundle, export
from models.hub import ModelError
from models.sampling import ddim, sample
from models.schedules import EDM, CosineVP, DiscreteVP, Flow
from trainers import cli

T = 1024
LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SHORT = LINEAR / 10  # alpha ends at 0.6: an untrained eps network paints far outside [-1, 1] where it is divided by less


def save(folder, denoiser, sampler, **about):
    """A model's folder."""
    hub.save(folder, {**hub.describe(denoiser), "sampler": sampler, **about}, denoiser.state_dict())
    return denoiser.eval().requires_grad_(False)


def trailing(steps: int, levels: int = T) -> dict:
    """The sampler of a progressive student."""
    return {"type": "ddim", "steps": steps, "times": [float(levels - i * levels // steps) for i in range(steps + 1)]}


def stock(prediction: str = "v", schedule=None, seed: int = 0, **network) -> Denoiser:
    """A student that diffusers has classes for."""
    torch.manual_seed(seed)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16),
                  layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
    return Denoiser(DiffusersUNet(**{"img_resolution": 8, "img_channels": 3, **blocks, **network}), schedule or DiscreteVP.cosine(T), prediction)


def shown(images: torch.Tensor) -> torch.Tensor:
    """As pipelines return them: in [0, 1], channels last."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def latents(count: int = 3, channels: int = 3) -> torch.Tensor:
    """What a pipeline draws from a generator seeded with 0."""
    return randn_tensor((count, channels, 8, 8), generator=torch.manual_seed(0))


def pipe(folder, steps: int, **settings) -> torch.Tensor:
    """Images of the folder's pipeline, by stock code and from the noise of `latents`."""
    loaded = DiffusionPipeline.from_pretrained(folder, **settings)
    assert type(loaded) is DDIMPipeline
    loaded.set_progress_bar_config(disable=True)
    return torch.from_numpy(loaded(3, generator=torch.manual_seed(0), num_inference_steps=steps, output_type="np").images)


@pytest.mark.parametrize("prediction, schedule", [
    ("v", DiscreteVP.cosine(T)), ("x0", DiscreteVP.cosine(T)), ("v", DiscreteVP(LINEAR)), ("eps", DiscreteVP(SHORT)),
    ("v", DiscreteVP(LINEAR, zero_terminal_snr=True)),
], ids=["v-cosine", "x0-cosine", "v-linear", "eps-short", "v-rescaled"])
def test_stages_as_plain_pipelines(tmp_path, prediction, schedule):
    """Each stage of a run becomes a DDIMPipeline, which at its own number of steps makes the images of this house's DDIM."""
    stages, levels = (1, 2, 4, 8), int(schedule.t_max)
    students = {n: save(tmp_path / f"run/stages/{n:05d}", stock(prediction, schedule, seed=n), trailing(n, levels)) for n in stages}
    lines = export(str(tmp_path / "run"), tmp_path / "out")
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "out" / str(n)) for n in stages]
    assert sorted(os.listdir(tmp_path / "out")) == ["1", "2", "4", "8"]
    for n, line in zip(stages, lines):
        ours = shown(ddim(students[n], latents(), n))
        worst = (pipe(tmp_path / "out" / str(n), n) - ours).abs().max()
        assert worst <= 1e-5 and f"num_inference_steps={n}" in line, (n, worst)
        assert 0.02 < ours.std() and ((0 < ours) & (ours < 1)).float().mean() > 0.2  # images, not clamped away


def test_the_scheduler_is_the_recipe(tmp_path):
    """The settings under which DDIMScheduler is exact are written down, and a wrong number of steps is another image."""
    student = save(tmp_path / "run/model", stock(), trailing(4))
    export(str(tmp_path / "run"), tmp_path / "out")
    said = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    wanted = dict(_class_name="DDIMScheduler", num_train_timesteps=T, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
                  set_alpha_to_one=True, steps_offset=0, rescale_betas_zero_snr=True, thresholding=False)
    assert {key: said[key] for key in wanted} == wanted and len(said["trained_betas"]) == T and said["trained_betas"][-1] == 1
    ours = shown(ddim(student, latents(), 4))
    assert (pipe(tmp_path / "out", 8) - ours).abs().max() > 1e-3
    euler = EulerDiscreteScheduler.from_config({k: v for k, v in said.items() if k != "_class_name"})
    euler.set_timesteps(4)
    x = latents() * euler.init_noise_sigma
    for t in euler.timesteps:
        x = euler.step(student.backbone.unet(euler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert (shown(x) - ours).abs().max() < 2e-3


def test_one_step_of_few_step_is_stock(tmp_path):
    """A generator of one step from pure noise is DDIM's only step."""
    student = save(tmp_path / "model", stock("x0"), {"type": "few_step", "timesteps": [T]})
    export(str(tmp_path), tmp_path / "out")
    ours = sample(student, {"type": "few_step", "timesteps": [T]}, [latents()])
    assert (pipe(tmp_path / "out", 1) - shown(ours)).abs().max() <= 1e-5


def test_an_export_is_a_teacher(tmp_path):
    """What was exported as a plain pipeline is read again as the same denoiser."""
    student = save(tmp_path / "model", stock("v", DiscreteVP(LINEAR)), {"type": "ddim", "steps": 50})
    export(str(tmp_path), tmp_path / "out")
    again, x, t = hub.load_denoiser(str(tmp_path / "out")), torch.randn(3, 3, 8, 8), torch.tensor([1.0, 500.0, 1000.0])
    torch.testing.assert_close(again(x, t), student(x, t), rtol=1e-5, atol=1e-5)
    assert again.prediction == "v" and hub.description(str(tmp_path / "out"))["sampler"]["steps"] == 50


OWN = {  # models that no class of diffusers samples, and why
    "labels": (lambda: stock(label_dim=4), trailing(2), "it has class labels"),
    "three-steps": (lambda: stock(), {"type": "ddim", "steps": 3, "times": [1024.0, 683.0, 341.0, 0.0]}, "3 steps do not divide the 1024 levels"),
    "own-times": (lambda: stock(), {"type": "ddim", "steps": 2, "times": [1024.0, 300.0, 0.0]}, "its times are its own"),
    "not-from-noise": (lambda: stock(), {"type": "few_step", "timesteps": [1000]}, "its times are its own"),
    "cosine": (lambda: stock(schedule=CosineVP()), {"type": "ddim", "steps": 2}, "its schedule is CosineVP"),
    "flow": (lambda: stock("flow", Flow(3.0)), {"type": "ddim", "steps": 2}, "it predicts flow"),
    "renoise": (lambda: stock(), {"type": "few_step", "timesteps": [1024, 512]}, "its sampler is few_step"),
    "edm2": (lambda: Denoiser(EDM2UNet(8, 3, 0, 16, (1, 2), num_blocks=1), EDM(), "edm"), {"type": "heun", "steps": 3}, "its network is an EDM2UNet"),
    "faint": (lambda: stock("eps", DiscreteVP.from_scheduler_config({"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"})),
              {"type": "ddim", "steps": 2}, "it predicts eps from alpha 4.8e-05"),
    "fine": (lambda: stock("x0"), trailing(128), "to sigma 1.2e-02, for which float32 betas are too coarse"),
}
ALONE = """  # run where neither package can be imported; argv is FOLDER WORK, a folder of exports and one with their noise
import json, sys
from pathlib import Path
sys.modules["models"] = sys.modules["trainers"] = None
import torch
folders, work = Path(sys.argv[1]).iterdir(), Path(sys.argv[2])
for folder in folders:
    sys.path.insert(0, str(folder))
    from pipeline import FewstepPipeline
    noise = list(torch.load(work / f"noise-{folder.name}.pt", weights_only=True))
    images = FewstepPipeline.from_pretrained(folder)(labels=[3, 0, 9], latents=noise, output_type="latent").images
    torch.save(images, work / f"images-{folder.name}.pt")
"""


def test_edm2_students_need_nothing_of_this_house(tmp_path):
    """EDM2 students with labels, exported, sample where `models` cannot be imported: the same images at one, two and four steps."""
    samplers = {1: {"type": "few_step", "timesteps": [80.0]}, 2: {"type": "ddim", "steps": 2, "times": [80.0, 3.0, 0.0]},
                4: {"type": "few_step", "timesteps": [80.0, 8.0, 2.0, 0.5]}}
    students = {n: save(tmp_path / f"run/stages/{n:05d}", tiny_denoiser(n), sampler) for n, sampler in samplers.items()}
    export(str(tmp_path / "run"), tmp_path / "out")
    noise = {n: torch.randn(4, 3, 1, 8, 8)[:len(sampler.get("timesteps", [0]))] for n, sampler in samplers.items()}
    for n in samplers:
        torch.save(noise[n], tmp_path / f"noise-{n}.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for n, sampler in samplers.items():
        ours = sample(students[n], sampler, list(noise[n]), class_labels(torch.tensor([3, 0, 9])))
        images = torch.load(tmp_path / f"images-{n}.pt", weights_only=True)
        assert (images - ours).abs().max() <= 1e-5 and ours.std() > 0.05


@pytest.mark.parametrize("trusted", [False, True])
def test_diffusers_own_way_to_load_code(tmp_path, trusted):
    """`custom_pipeline` loads the folder once its code is trusted, and is refused by diffusers before."""
    student = save(tmp_path / "model", tiny_denoiser(), {"type": "few_step", "timesteps": [80.0]})
    export(str(tmp_path), tmp_path / "out")
    if not trusted:
        with pytest.raises(ValueError, match="contains custom code"):
            DiffusionPipeline.from_pretrained(tmp_path / "out", custom_pipeline=str(tmp_path / "out"))
        return
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", custom_pipeline=str(tmp_path / "out"), trust_remote_code=True)
    images = loaded(labels=[1, 2], latents=latents(2, 1), output_type="np").images
    ours = sample(student, {"type": "few_step", "timesteps": [80.0]}, [latents(2, 1)], class_labels(torch.tensor([1, 2])))
    assert (torch.from_numpy(images) - shown(ours)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="classes from 0 to 9"):
        loaded(labels=[10])


@pytest.fixture
def pipeline_of(tmp_path):
    """The pipeline of an exported model, by way of the bundled file."""
    def load(denoiser, sampler, **about):
        save(tmp_path / "model", denoiser, sampler, **about)
        export(str(tmp_path), tmp_path / "out")
        return DiffusionPipeline.from_pretrained(tmp_path / "out", custom_pipeline=str(tmp_path / "out"), trust_remote_code=True)
    return load


@pytest.mark.parametrize("make, sampler, reason", OWN.values(), ids=OWN)
def test_what_brings_its_own_code(tmp_path, pipeline_of, make, sampler, reason):
    """A model that stock code would sample wrongly, or not at all, brings its sampler along; the card says why."""
    student = make().eval()
    loaded = pipeline_of(student, sampler)
    assert reason in (tmp_path / "out/README.md").read_text()
    about = hub.description(str(tmp_path))
    noise = [torch.randn(2, about["channels"], 8, 8) for _ in range(2)][:len(sampler.get("timesteps", [0]))]
    cond = class_labels(torch.tensor([0, 1])) if about["classes"] else None
    images = loaded(2, latents=noise, output_type="latent").images
    assert (images - sample(student, sampler, noise, cond)).abs().max() <= 1e-5


def test_the_pipeline_draws_its_noise(pipeline_of):
    """Noise that is not given comes of the generator: latents first, then a draw for each later step; labels go in turn."""
    sampler = {"type": "few_step", "timesteps": [80.0, 2.0]}
    student = tiny_denoiser()
    loaded = pipeline_of(student, sampler)
    first, second = (randn_tensor((12, 1, 8, 8), generator=g) for g in [torch.Generator().manual_seed(5)] * 2)
    images = loaded(12, generator=torch.Generator().manual_seed(5), output_type="pt").images
    ours = sample(student, sampler, [first, second], class_labels(torch.arange(12) % 10))
    assert torch.equal(images, (ours / 2 + 0.5).clamp(0, 1)) and not torch.equal(first, second)
    pictures = loaded(labels=[3], generator=torch.Generator().manual_seed(5)).images
    assert pictures[0].size == (8, 8) and pictures[0].mode == "L"


def test_guidance_of_an_exported_teacher(pipeline_of):
    """A teacher that was trained without labels too can be guided as here; a student cannot."""
    teacher, sampler = tiny_denoiser(), {"type": "heun", "steps": 2}
    loaded = pipeline_of(teacher, sampler, unconditional=True)
    images = loaded(labels=[1, 2], latents=latents(2, 1), guidance=2.0, output_type="latent").images
    cond = class_labels(torch.tensor([1, 2]))
    assert torch.equal(images, sample(teacher, sampler, [latents(2, 1)], cond, guidance=2.0))
    assert not torch.allclose(images, sample(teacher, sampler, [latents(2, 1)], cond))
    loaded = pipeline_of(teacher, {"type": "few_step", "timesteps": [80.0]}, unconditional=True)
    with pytest.raises(ValueError, match="no guidance that could be set"):
        loaded(guidance=2.0)


def test_guidance_that_is_an_input(pipeline_of):
    """A student that takes the strength of guidance is told it, and only what it was distilled for."""
    torch.manual_seed(0)
    network = EDM2UNet(8, 1, 10, 16, (1, 2), num_blocks=1, channels_per_head=16, guided=True)
    for name, p in network.named_parameters():
        p.data.fill_(0.5) if name.endswith("gain") else None
    student, sampler = Denoiser(network, EDM(), "edm"), {"type": "ddim", "steps": 2}
    loaded = pipeline_of(student, sampler, guidance=[1.5, 4.0])
    strong, least = (loaded(labels=[1, 2], latents=latents(2, 1), guidance=w, output_type="latent").images for w in (3.0, None))
    for images, w in ((strong, 3.0), (least, 1.5)):
        assert torch.equal(images, sample(student, sampler, [latents(2, 1)], {"labels": torch.tensor([1, 2]), "guidance": torch.tensor([w, w])}))
    assert not torch.allclose(strong, least)
    with pytest.raises(ValueError, match="takes 1.5 to 4.0"):
        loaded(guidance=1.0)


def test_latents_are_not_clamped(pipeline_of):
    """A latent model, whose values have no bounds, is never a DDIMPipeline, and refuses to paint its latents."""
    denoiser = stock(img_channels=4)
    loaded = pipeline_of(denoiser, trailing(2))
    noise = 3 * latents(2, 4)
    assert torch.equal(loaded(2, latents=noise, output_type="latent").images, ddim(denoiser, noise, 2))
    with pytest.raises(ValueError, match='output_type="latent"'):
        loaded(2)


def test_the_bundle_is_whole():
    """pipeline.py imports nothing of this house, defines each name once, and looks up none that it does not have."""
    text = bundle("FewstepPipeline")
    nodes = ast.parse(text).body
    imported = {alias for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert not {name.split(".")[0] for name in imported} - {"torch", "diffusers"} - set(sys.stdlib_module_names)
    bound = [name for node in nodes for name in _bound(node)]
    assert len(bound) == len(set(bound)) and not _used(text) - set(bound) - set(dir(builtins)) - {"__name__"}
    assert not {"draw", "Noise", "tqdm", "load_denoiser", "from_nvlabs"} & set(bound) and {"EDM2UNet", "DiffusersUNet", "heun"} <= set(bound)
    house = [name for source in SOURCES for node, _ in _statements(Path(module.__file__).with_name(f"{source}.py"))
             if not isinstance(node, (ast.Import, ast.ImportFrom)) for name in _bound(node)]
    assert [name for name in set(house) & set(bound) if house.count(name) > 1] == []


def test_the_card(tmp_path):
    """The card says what the model is, for how many steps, of what teacher, and how to sample it; its code runs."""
    save(tmp_path / "model", stock(), trailing(2), trained={"teacher": "runs/teacher", "images": 5})
    export(str(tmp_path), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    head, code = card.split("---")[1], card.split("```python\n")[1].split("```")[0]
    assert "library_name: diffusers" in head and "Valid for 2 steps only" in card and '"runs/teacher"' in card and "prediction: v" in card
    assert "DiscreteVP, 1024 levels" in card and len(card) < 3000  # the betas are not printed
    space = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(tmp_path / "out")), space)
    assert len(space["images"]) == 16 and space["images"][0].size == (8, 8)


def test_eps_at_pure_noise_is_refused(tmp_path):
    """What neither house can sample is not exported, and nothing is left behind."""
    save(tmp_path / "model", stock("eps"), trailing(2))
    with pytest.raises(ModelError, match="eps says nothing"):
        export(str(tmp_path), tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_else_is_overwritten(tmp_path):
    """An export replaces an export, whole; a folder with anything else in it is left alone."""
    save(tmp_path / "model", stock(), trailing(2))
    save(tmp_path / "stages/00004", stock(seed=1), trailing(4))
    export(str(tmp_path), tmp_path / "out")
    export(str(tmp_path), tmp_path / "out")
    export(str(tmp_path / "model"), tmp_path / "out/4")
    assert "Valid for 2 steps" in (tmp_path / "out/4/README.md").read_text() and os.listdir(tmp_path / "out") == ["4"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("thoughts")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file", "model", "out/4"):
        with pytest.raises(ModelError, match="is no export of this kind"):
            export(str(tmp_path), tmp_path / name)
    with pytest.raises(ModelError, match="cannot be written"):
        export(str(tmp_path), tmp_path / "file/below")
    assert (tmp_path / "mine/README.md").read_text() == "thoughts" and (tmp_path / "model/model.safetensors").is_file()


def test_the_command(tmp_path):
    """`fewstep export` prints a line for each stage's folder, by default in the run's."""
    save(tmp_path / "run/stages/00002", stock(), trailing(2))
    save(tmp_path / "run/stages/00001", stock(), trailing(1))
    said = run("fewstep", "export", tmp_path / "run", "--to", "diffusers").stdout.splitlines()
    assert [line.split(": ")[0] for line in said] == [f"{tmp_path}/run/diffusers/1", f"{tmp_path}/run/diffusers/2"]
    space = {}
    exec(said[0].split(": ", 1)[1], space)  # the line says how to sample it
    assert len(space["images"]) == 16


@pytest.mark.parametrize("words, sentence", [
    (("export", "RUN", "--to", "onnx"), "diffusers is what there is"), (("export", "RUN"), "there is no model there"),
    (("export", "RUN/typo", "--out", "RUN/out"), "there is no model there"),
])
def test_the_command_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    """One line on stderr, code 2, and no folder left behind."""
    monkeypatch.setattr("sys.argv", ["fewstep", *(word.replace("RUN", str(tmp_path)) for word in words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and sentence in capsys.readouterr().err and not os.listdir(tmp_path)
