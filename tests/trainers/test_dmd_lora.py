"""DMD on adapters: three networks that are one base train as three networks do. tests/models/test_lora.py has the adapters themselves."""

import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from conftest import save_teacher, tiny_denoiser
from models import hub
from models.denoiser import Denoiser, ScoreModel
from models.diffusers_conditional import DiffusersPromptUNet
from models.diffusers_unet import DiffusersUNet
from models.discriminator import DiscriminatorHead
from models.lora import LoraBank, LoraRole
from models.noise import Noise
from models.schedules import DiscreteVP
from trainers.checkpoint import latest_good
from trainers.config import ConfigError, load_config
from trainers.data import Batch, load_images
from trainers.dmd import DMD, DmdConfig, LoraConfig
from trainers.ema import EmaConfig, ShardedEMA
from trainers.engine import Cluster
from trainers.launch import Plan
from trainers.optim import OptimConfig
from trainers.teacher import load_teacher

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)
LORA = LoraConfig(rank=4, alpha=8.0)
BLOCKS = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16),
              layers_per_block=1, norm_num_groups=4, attention_head_dim=8)
SDXL = dict(prompt_tokens=5, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=(2, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run's folder with a UNet2DModel that has attention, that nobody trained."""
    torch.manual_seed(0)
    denoiser = Denoiser(DiffusersUNet(8, 1, 10, null_class=True, **BLOCKS), DiscreteVP(torch.linspace(1e-3, 0.1, 100)), "v")
    return save_teacher(tmp_path_factory.mktemp("teacher"), denoiser)


def trainer(teacher, tmp_path, precision="no", compiler=None, **settings) -> DMD:
    settings = dict(timesteps=(100.0,), fake_updates=2, gan_weight=0.5, disc_weight=0.1, generator=OPTIM, fake_score=OPTIM, lora=LORA) | settings
    config = DmdConfig(teacher=str(teacher), out=str(tmp_path / "run"), images=24, **settings)
    config = replace(config, loop=replace(config.loop, batch=8, log_every=8), eval=replace(config.eval, samples=16))
    config.check(1)
    made = DMD(DMD.prepare(config), Cluster(DMD.networks, Plan("test", precision=precision, compiler=compiler)), load_images(config.data))
    made.build()
    return made


def batch(made, start=0, n=8) -> Batch:
    rows, device = list(range(start, start + n)), made.cluster.device
    images, labels = made.images.take(rows)
    return Batch(images.to(device), {"labels": labels.to(device)}, Noise(0, 0, rows, device))


def steps(made, count):
    for _ in range(count):
        yield made.step(batch(made, made.images_seen))
        made.images_seen += 8


def snapshot(module):
    return {n: p.detach().float().cpu().clone() for n, p in module.named_parameters()}


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def taken_apart(made: DMD) -> DMD:
    """The same networks as three that share nothing: a teacher without adapters, and a copy of it for each adapter."""
    config, roles, names = made.config, {"generator": made.generator, "fake_score": made.fake_score}, ("generator", "fake_score")
    apart = DMD(config, made.cluster, made.images)
    apart.build()
    apart.teacher = apart.guided_teacher = load_teacher(config.teacher, made.cluster)
    banks = {n: LoraBank(load_teacher(config.teacher, made.cluster), (n,), config.lora.rank, config.lora.alpha) for n in names}
    disc = DiscriminatorHead(16, 4)
    models = {"generator": banks["generator"].denoiser, "fake_score": ScoreModel(banks["fake_score"].denoiser, disc)}
    for name, bank in banks.items():
        role = LoraRole(bank, name, models[name]).to(made.cluster.device)
        role.load_state_dict(roles[name].module.state_dict())
        setattr(apart, name, apart._engine(name, role))
    apart.ema = ShardedEMA(apart.generator, config.ema)
    return apart


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_base_trains_as_three_networks_do(teacher, tmp_path, checkpointing):
    """Four iterations with GAN, two of them with a generator update: adapters, head and losses end as those of separate networks."""
    made = trainer(teacher, tmp_path, lora=replace(LORA, checkpointing=checkpointing))
    apart, start = taken_apart(made), (snapshot(made.generator.module), snapshot(made.fake_score.module))
    for shared, separate in zip(list(steps(made, 4)), list(steps(apart, 4))):
        assert shared.keys() == separate.keys()
        assert all(torch.allclose(shared[k], separate[k], rtol=1e-5, atol=1e-6) for k in shared)
    for engine, other, before in zip((made.generator, made.fake_score), (apart.generator, apart.fake_score), start):
        assert difference(snapshot(engine.module), snapshot(other.module)) <= 1e-6
        assert difference(snapshot(engine.module), before) > 5e-4
    assert difference(made.ema.gather(), apart.ema.gather()) <= 1e-6


def test_only_adapters_and_head_are_trained(teacher, tmp_path):
    """Every adapter's weight moves, no weight of the base does, and what requires a gradient is the same at the end of every step."""
    made = trainer(teacher, tmp_path)
    frozen = {n: p.clone() for n, p in made.teacher.named_parameters() if "lora_" not in n}
    roles, wanted = (made.generator.module, made.fake_score.module), [p.requires_grad for p in made.teacher.parameters()]
    before = [snapshot(role) for role in roles]
    for _ in steps(made, 4):
        assert [p.requires_grad for p in made.teacher.parameters()] == wanted
    assert all(torch.equal(p, frozen[n]) for n, p in made.teacher.named_parameters() if n in frozen)
    for role, start in zip(roles, before):
        assert all(not torch.equal(p.cpu(), start[n]) for n, p in role.named_parameters())
    assert made.teacher.backbone.unet is made.generator.module.shared[1].backbone.unet is made.fake_score.module.shared[1].denoiser.backbone.unet


def test_the_teacher_stays_itself(teacher, tmp_path):
    """After training, the network without adapters is bit for bit the teacher, and the generator is not."""
    made = trainer(teacher, tmp_path)
    list(steps(made, 4))
    b, t = batch(made), torch.full((8,), 50.0, device=made.cluster.device)
    wanted = hub.load_denoiser(str(teacher), made.cluster.device)(b.images, t, b.cond)
    assert torch.equal(made.teacher(b.images, t, b.cond), wanted) and not torch.allclose(made.generator(b.images, t, b.cond), wanted)


def test_each_turn_trains_its_own_role(teacher, tmp_path):
    """The adversarial gradient crosses the frozen fake score on the same layers into the generator alone, which the other turn leaves alone."""
    made = trainer(teacher, tmp_path, matching_weight=0.0)
    list(steps(made, 2))  # B of a fresh adapter is zero, and so is the gradient of its A
    made.made, (generator, fake) = [], (snapshot(made.generator.module), snapshot(made.fake_score.module))
    with made.fake_score.frozen():
        made.generator_loss(batch(made, 16), 0)["loss"].backward()
    assert all(p.grad is None for p in made.fake_score.module.parameters())
    reached = {n for n, p in made.generator.module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == set(generator)
    made.generator.optimizer.zero_grad()
    made.images_seen = 24
    made.step(batch(made, 24))
    assert difference(snapshot(made.generator.module), generator) == 0 < difference(snapshot(made.fake_score.module), fake)


@pytest.mark.parametrize("networks", [("generator",), ("fake_score",)])
def test_one_of_the_two_may_be_trained_in_full(teacher, tmp_path, networks):
    """What is not named has all its weights trained, on a copy of its own, and the result is of the generator's kind."""
    made = trainer(teacher, tmp_path, lora=replace(LORA, networks=networks))
    frozen = {n: p.clone() for n, p in made.teacher.named_parameters() if "lora_" not in n}
    full = made.fake_score if networks == ("generator",) else made.generator
    before = snapshot(full.module)
    list(steps(made, 3))
    assert difference(snapshot(full.module), before) > 5e-4 and len(before) >= len(frozen)
    assert all(torch.equal(p, frozen[n]) for n, p in made.teacher.named_parameters() if n in frozen)
    made.images_seen = 0
    made.fit()
    assert ("lora" in hub.description(str(made.out))) == (networks == ("generator",))
    hub.load_denoiser(str(made.out))


def test_the_result_is_the_generator(teacher, tmp_path):
    """OUT/model is an adapter on the teacher; it loads with the x0 that the generator had in training, of the weights or of their average."""
    for name, ema in (("weights", EmaConfig(sigma_rel=())), ("average", EmaConfig())):
        made = trainer(teacher, tmp_path / name, ema=ema)
        made.config = replace(made.config, loop=replace(made.config.loop, eval_every=8))
        made.fit()
        about, loaded = hub.description(str(made.out)), hub.load_denoiser(str(made.out), made.cluster.device)
        assert about["lora"] == {"rank": 4, "alpha": 8.0, "targets": made.description["lora"]["targets"], "base": str(teacher)}
        made.generator.module.load_state_dict(made.ema.gather())
        b, t = batch(made), torch.full((8,), 100.0, device=made.cluster.device)
        wanted = made.generator(b.images, t, b.cond)
        assert (loaded(b.images, t, b.cond) - wanted).abs().max() <= 1e-6 < 1e-4 < (made.teacher(b.images, t, b.cond) - wanted).abs().max()
        assert torch.equal(made.average()(b.images, t, b.cond), loaded(b.images, t, b.cond))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_student_of_sdxls_kind_is_a_lora_that_diffusers_reads(tmp_path, checkpointing):
    """Trained on prompts, with GAN: load_lora_weights of the run's model puts every layer into a fresh pipeline, which predicts what it did."""
    torch.manual_seed(0)
    denoiser = Denoiser(DiffusersPromptUNet(8, 4, **SDXL), DiscreteVP(torch.linspace(1e-3, 0.1, 100)), "eps").eval().requires_grad_(False)
    optim, lora = replace(OPTIM, eps=1e-9), replace(LORA, checkpointing=checkpointing)  # some gradients of attention's A are 1e-8
    config = DmdConfig(teacher=str(save_teacher(tmp_path / "t", denoiser)), out=str(tmp_path / "run"), timesteps=(100.0, 50.0), fake_updates=2,
                       gan_weight=0.5, generator=optim, fake_score=optim, lora=lora, ema=EmaConfig(sigma_rel=()))
    config = replace(config, loop=replace(config.loop, batch=4), data=replace(config.data, channels=4, classes=0))
    made = DMD(DMD.prepare(config), Cluster(DMD.networks, Plan("test")), None)
    made.build()
    start, device = snapshot(made.generator.module), made.cluster.device
    cond = {"prompt_embeds": torch.randn(4, 5, 12), "pooled": torch.randn(4, 10), "time_ids": torch.tensor([[64.0, 64, 0, 3, 64, 64]]).repeat(4, 1)}
    cond = {key: value.to(device) for key, value in cond.items()}
    for made.images_seen in range(0, 24, 4):
        rows = list(range(made.images_seen, made.images_seen + 4))
        made.step(Batch(torch.randn(4, 4, 8, 8, device=device), cond, Noise(0, 0, rows, device)))
    assert all(not torch.equal(p, start[n]) for n, p in snapshot(made.generator.module).items())
    made.export()

    pipe = StableDiffusionXLPipeline(None, None, None, None, None, denoiser.backbone.unet.to(device), EulerDiscreteScheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # with which peft says that keys were lost
        pipe.load_lora_weights(str(tmp_path / "run" / "model"))
    adapted = [m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)]
    assert len(adapted) == len(start) / 2 and all(m.active_adapters == ["default_0"] for m in adapted)
    x, t = torch.randn(4, 4, 8, 8, device=device), torch.full((4,), 100.0, device=device)
    wanted, teacher = made.generator(x, t, cond), made.teacher(x, t, cond)
    for found in (denoiser, hub.load_denoiser(str(made.out), device)):  # the pipeline's network is the first one's
        assert (found(x, t, cond) - wanted).abs().max() <= 1e-5 * wanted.abs().max() and (found(x, t, cond) - teacher).abs().max() > 1e-3


def test_a_run_resumes_bit_for_bit_and_stores_adapters_alone(teacher, tmp_path):
    """Interrupted and started anew, adapters, head, moments and average end the same; the checkpoint is no larger than they are."""
    ends = []
    for out, stops in (("whole", (40,)), ("parts", (16, 40))):
        for images in stops:
            made = trainer(teacher, tmp_path / out)
            made.config = replace(made.config, images=images)
            made.fit()
        state = {f"{n}/{k}/{s.name}": s.tensor.clone() for n, (e, _) in made.engines.items() for k, shards in e.state()[0].items() for s in shards}
        ends.append({**state, **made.ema.gather()})
    assert difference(*ends) == 0 and any("exp_avg_sq" in k for k in ends[0])
    count = sum(p.numel() for engine, _ in made.engines.values() for p in engine.parameters)
    average = sum(p.numel() for p in made.generator.parameters)
    stored = sum(f.stat().st_size for f in latest_good(made.out / "checkpoints").rglob("*.safetensors"))
    assert 4 * (3 * count + average) < stored < 4 * (3 * count + average) + 200_000  # names and offsets are the rest


def test_accumulation_is_one_batch(teacher, tmp_path):
    """Both roles on microbatches of their own sizes end where whole batches do."""
    whole, parts = trainer(teacher, tmp_path), None
    list(steps(whole, 4))
    parts = trainer(teacher, tmp_path, generator=replace(OPTIM, accumulation=2), fake_score=replace(OPTIM, accumulation=4))
    list(steps(parts, 4))
    for a, b in ((whole.generator, parts.generator), (whole.fake_score, parts.fake_score)):
        assert difference(snapshot(a.module), snapshot(b.module)) < 1e-5


def test_a_bfloat16_run_has_float32_adapters(teacher, tmp_path):
    """The base is bfloat16 and is there once; adapters, head and average are float32, and steps below bfloat16's resolution move them."""
    small = replace(OPTIM, lr=1e-5, eps=1e-8)
    made = trainer(teacher, tmp_path, "bf16", generator=small, fake_score=small, lora=replace(LORA, checkpointing=True))
    assert {p.dtype for n, p in made.teacher.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    before = snapshot(made.generator.module), snapshot(made.fake_score.module)
    for metrics in steps(made, 4):
        assert all(torch.isfinite(v) for v in metrics.values())
    for engine, start in zip((made.generator, made.fake_score), before):
        assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
        assert 0 < difference(snapshot(engine.module), start) < 2e-4
        assert all(not torch.equal(p, start[n]) for n, p in snapshot(engine.module).items() if n.endswith("lora_B.weight"))


def test_compiled_training_is_training(teacher, tmp_path):
    """A compiled launch has a graph for each role and each way to call it, and ends in the same adapters."""
    from torch._dynamo.utils import counters

    ends = []
    for compiler in (None, "aot_eager"):
        torch._dynamo.reset()
        counters.clear()
        made = trainer(teacher, tmp_path, compiler=compiler)
        list(steps(made, 4))
        ends.append({**snapshot(made.generator.module), **{f"fake/{n}": p for n, p in snapshot(made.fake_score.module).items()}})
    assert difference(*ends) < 1e-6 and 0 < counters["stats"]["unique_graphs"] < 10 and not counters["graph_break"]


# --- what is asked for, and what is refused


def test_a_recipe_and_the_command_line_say_it(tmp_path):
    """A section of a recipe, and lists on the command line."""
    (tmp_path / "r.yaml").write_text("method: dmd\nlora: {rank: 64, alpha: 8, targets: [attention, conv_in]}\n")
    words = ["--recipe", str(tmp_path / "r.yaml"), "--lora.networks", '["generator"]', "--lora.checkpointing", "true"]
    found = load_config(DmdConfig, words, "digits_dmd", "dmd")
    assert found.lora == LoraConfig(64, 8.0, ("attention", "conv_in"), ("generator",), True)
    assert found.lora.adapted == ("generator",) and DmdConfig().lora.adapted == ()


@pytest.mark.parametrize("lora, said", [
    (LoraConfig(rank=-1), "lora.rank is -1"),
    (LoraConfig(networks=("generator",)), "lora.networks is given, and lora.rank is 0"),
    (LoraConfig(alpha=8.0), "lora.alpha is given, and lora.rank is 0"),
    (LoraConfig(rank=4, alpha=0.0), "lora.alpha is 0.0"),
    (LoraConfig(rank=4, networks=()), "lora.networks is .*, and must name generator or fake_score, or both"),
    (LoraConfig(rank=4, networks=("student",)), "lora.networks is .*student.*, and must name"),
    (LoraConfig(rank=4, targets=("to_w",)), "lora.targets to_w names no nn.Linear or nn.Conv2d of its DiffusersUNet"),
    (LoraConfig(rank=4, targets=()), "lora.targets .* names no nn.Linear"),
])
def test_what_cannot_work_is_one_sentence(teacher, tmp_path, lora, said):
    """Each is refused before any network is built, and names its field."""
    config = DmdConfig(teacher=str(teacher), out=str(tmp_path / "run"), lora=lora)
    with pytest.raises(ConfigError, match=said) as error:
        config.check(1)
        DMD.prepare(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lora, said", [(LORA, "lora.targets dmd2 names no nn.Linear or nn.Conv2d of its EDM2UNet")])
def test_an_edm2_teacher_is_refused(tiny_teacher, tmp_path, lora, said):
    """Its layers normalise their weights, and are none that peft knows."""
    with pytest.raises(ConfigError, match=said):
        DMD.prepare(DmdConfig(teacher=str(tiny_teacher), out=str(tmp_path / "run"), lora=lora))


def test_compiled_checkpointing_is_refused(teacher, tmp_path):
    """torch.compile breaks at every block that is to select its adapter anew."""
    config = DmdConfig(teacher=str(teacher), out=str(tmp_path / "run"), lora=replace(LORA, checkpointing=True), timesteps=(100.0,))
    made = DMD(config, Cluster(DMD.networks, Plan("test", compiler="aot_eager")), load_images(config.data))
    with pytest.raises(ConfigError, match="lora.checkpointing is true, .* launch with dynamo_backend no"):
        made.build()
