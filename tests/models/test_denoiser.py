"""The denoiser contract: conversions between predictions, preconditioning, and the model in training."""

import math

import pytest
import torch
from torch.testing import assert_close

from models.denoiser import PREDICTIONS, Denoiser, ScoreModel, Translated, from_x0, to_x0
from models.discriminator import DiscriminatorHead
from models.edm2_unet import EDM2UNet, LogVar
from models.schedules import EDM, CosineVP, DiscreteVP, Flow, expand
from trainers.losses import denoising_loss, edm_weight

DDPM = DiscreteVP(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SCHEDULES = {"cosine": CosineVP(), "clipped": CosineVP(20.0), "discrete": DDPM, "edm": EDM(), "flow": Flow(3.0)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_conversion = pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])


def gaussians(*shape, seed=0, dtype=torch.float64):
    return torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def tiny_unet():
    torch.manual_seed(0)
    net = EDM2UNet(8, 1, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    for name, p in net.named_parameters():
        if name.endswith("gain"):
            p.data.fill_(0.5)
    return net


def exact_output(prediction, x0, eps, alpha, sigma):
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]


@every_conversion
@every_schedule
def test_conversions_are_inverses(schedule, prediction):
    """to_x0 and from_x0 undo each other, whatever x_t is, at every time between the ends."""
    value, x_t = gaussians(9, 2, 3, 3)
    alpha, sigma = schedule.alpha_sigma(schedule.time(torch.linspace(0.05, 0.95, 9, dtype=torch.float64)))
    there = to_x0(prediction, value, x_t, alpha, sigma)
    assert_close(from_x0(prediction, there, x_t, alpha, sigma), value, rtol=1e-9, atol=1e-9)
    there = from_x0(prediction, value, x_t, alpha, sigma)
    assert_close(to_x0(prediction, there, x_t, alpha, sigma), value, rtol=1e-9, atol=1e-9)


@every_conversion
@every_schedule
def test_denoiser_of_exact_output_returns_the_data(schedule, prediction):
    """A network that outputs the exact eps, v, flow or x0 of known data makes a denoiser that returns the data."""
    x0, eps = gaussians(9, 2, 3, 3)
    t = schedule.time(torch.linspace(0.05, 0.95, 9, dtype=torch.float64))
    alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(t))
    output = exact_output(prediction, x0, eps, alpha, sigma)
    denoiser = Denoiser(lambda x, c_noise, cond: output, schedule, prediction)
    assert_close(denoiser(alpha * x0 + sigma * eps, t), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_pure_noise(prediction):
    """At alpha = 0 the data comes back exactly from every prediction that still contains it."""
    x0, eps = gaussians(1, 1, 4, 4)
    alpha, sigma = CosineVP().alpha_sigma(torch.ones(1, dtype=torch.float64))
    output = from_x0(prediction, x0, eps, alpha, sigma)
    assert_close(output, exact_output(prediction, x0, eps, 0.0, 1.0), rtol=0, atol=1e-15)
    assert_close(to_x0(prediction, output, eps, alpha, sigma), x0, rtol=0, atol=1e-15)


@every_conversion
def test_clean_data(prediction):
    """At sigma = 0 the data is x_t, whatever the network says, unless it says the data itself."""
    x0, output = gaussians(1, 1, 4, 4)
    alpha, sigma = CosineVP().alpha_sigma(torch.zeros(1, dtype=torch.float64))
    expected = output if prediction == "x0" else x0
    assert torch.equal(to_x0(prediction, output, x0, alpha, sigma), expected)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_output_is_converted_in_float32(prediction, autocast):
    """At DDPM's last step, where 1/alpha is 157, a bfloat16 output loses nothing more in the conversion, under autocast too."""
    x0, eps = gaussians(4, 3, 8, 8)
    x0, t = x0.clamp(-1, 1), torch.full((4,), 1000.0)
    alpha, sigma = (c.item() for c in DDPM.alpha_sigma(1000))
    assert 157 < 1 / alpha < 158
    x_t = (alpha * x0 + sigma * eps).float()
    output = exact_output(prediction, x0, eps, alpha, sigma).bfloat16()
    denoiser = Denoiser(lambda x, c_noise, cond: output, DDPM, prediction)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = denoiser(x_t, t)
    alpha, sigma = torch.full((4,), alpha, dtype=torch.float64), torch.full((4,), sigma, dtype=torch.float64)
    assert found.dtype == torch.float32
    assert_close(found.double(), to_x0(prediction, output.double(), x_t.double(), alpha, sigma), rtol=1e-5, atol=1e-4)


def test_float32_at_the_last_step():
    """In float32 an exact eps gives the data back to 2e-4 at DDPM's last step, though the error of x_t is amplified 157 times."""
    x0, eps = gaussians(4, 3, 8, 8, dtype=torch.float32)
    t = torch.full((4,), 1000.0)
    denoiser = Denoiser(lambda x, c_noise, cond: eps, DDPM, "eps")
    assert_close(denoiser(DDPM.add_noise(x0, eps, t), t), x0, rtol=0, atol=2e-4)


def test_half_precision_input():
    """Half precision images are denoised in float32, at the time that was asked for."""
    x_t, seen = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16), []
    denoiser = Denoiser(lambda x, c_noise, cond: seen.append(c_noise) or x, DDPM, "eps")
    assert denoiser(x_t, torch.tensor([999, 500])).dtype == torch.float32
    assert seen[0].tolist() == [998, 499]


@every_schedule
def test_score_of_a_mixture_is_its_posterior_mean(schedule):
    """A network that outputs -sigma times the score of a Gaussian mixture (by autograd) denoises to the closed E[x0 | x_t]."""
    means, s = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64), 0.3
    t = schedule.time(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
    alpha, sigma = (c.reshape(5, 1, 1, 1) for c in schedule.alpha_sigma(t))
    x_t = gaussians(5, 1, 4, 4)[0].requires_grad_()
    variance = alpha**2 * s**2 + sigma**2
    log_parts = torch.stack([-(x_t - alpha * m) ** 2 / (2 * variance) for m in means])
    score, = torch.autograd.grad(log_parts.logsumexp(0).sum(), x_t)
    denoiser = Denoiser(lambda x, c_noise, cond: -sigma * score, schedule, "eps")
    posterior = torch.stack([m + alpha * s**2 / variance * (x_t - alpha * m) for m in means])
    assert_close(denoiser(x_t, t), (log_parts.softmax(0) * posterior).sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_preconditioning(sigma_data):
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), with the coefficients of Karras et al. 2022, table 1."""
    x_t, _ = gaussians(5, 1, 4, 4)
    sigma = torch.tensor([0.002, 0.1, sigma_data, 3.0, 80.0], dtype=torch.float64)
    seen = []
    denoiser = Denoiser(lambda x, c_noise, cond: seen.append((x, c_noise)) or torch.tanh(x), EDM(sigma_data=sigma_data), "edm")
    found = denoiser(x_t, sigma)
    s, total = expand(sigma, x_t), expand((sigma**2 + sigma_data**2).sqrt(), x_t)
    assert_close(seen[0][0], x_t / total, rtol=1e-12, atol=0)
    assert_close(seen[0][1], sigma.log() / 4, rtol=1e-12, atol=0)
    expected = sigma_data**2 / total**2 * x_t + s * sigma_data / total * torch.tanh(x_t / total)
    assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 2.0, 80.0])
def test_edm_loss_starts_at_one(sigma):
    """On Gaussian data of sigma_data an untrained network is c_skip x, and its EDM-weighted loss 1 within 4 standard errors."""
    x0, eps = gaussians(400, 1, 8, 8)
    x0, t = 0.5 * x0, torch.full((400,), sigma, dtype=torch.float64)
    denoiser = Denoiser(EDM2UNet(8, 1, model_channels=4, channel_mult=(1,), num_blocks=1), EDM(), "edm")
    with torch.no_grad():
        x_t = x0 + sigma * eps
        found = denoiser(x_t, t)
    assert_close(found, 0.25 / (sigma**2 + 0.25) * x_t, rtol=1e-12, atol=0)
    loss = denoising_loss(found, x0, edm_weight(t, 0.5))
    assert abs(loss.mean() - 1) < 4 * loss.std() / math.sqrt(len(loss))


def test_network_is_its_share_of_the_error():
    """The EDM-weighted loss is the squared error of the raw network's output against its own target, at every noise level."""
    x0, eps = gaussians(5, 1, 4, 4)
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    denoiser = Denoiser(lambda x, c_noise, cond: torch.tanh(x), EDM(), "edm")
    x_t, s = x0 + expand(sigma, x0) * eps, expand(sigma, x0)
    total = (s**2 + 0.25).sqrt()
    target = (x0 - 0.25 / total**2 * x_t) * total / (s * 0.5)
    error = (torch.tanh(x_t / total) - target).square().flatten(1).mean(1)
    assert_close(denoising_loss(denoiser(x_t, sigma), x0, edm_weight(sigma, 0.5)), error, rtol=1e-9, atol=0)


def test_one_time_for_the_batch():
    """A single time means the same as that time for every sample."""
    x_t, _ = gaussians(3, 1, 8, 8, dtype=torch.float32)
    denoiser = Denoiser(tiny_unet(), EDM(), "edm")
    assert torch.equal(denoiser(x_t, torch.tensor(0.7)), denoiser(x_t, torch.full((3,), 0.7)))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", ""])
def test_unknown_prediction(prediction):
    """A prediction that does not exist is refused, and the message lists those that do."""
    with pytest.raises(ValueError, match=", ".join(PREDICTIONS)):
        Denoiser(tiny_unet(), EDM(), prediction)
    with pytest.raises(ValueError, match=", ".join(PREDICTIONS)):
        to_x0(prediction, *torch.ones(2, 1, 1, 2, 2), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("schedule", [CosineVP(), DDPM, Flow()], ids=["cosine", "discrete", "flow"])
def test_edm_wants_its_schedule(schedule):
    """EDM preconditioning on another schedule is refused."""
    with pytest.raises(ValueError, match=type(schedule).__name__):
        Denoiser(tiny_unet(), schedule, "edm")


def score_model():
    net = tiny_unet()
    disc = DiscriminatorHead(net.feature_channels, net.feature_resolution)
    return ScoreModel(Denoiser(net, EDM(), "edm", LogVar()), disc).eval()


def count_calls(modules):
    calls = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    return calls


def test_logits_alone_run_only_the_encoder():
    """A pass for the discriminator alone runs every encoder block once and neither decoder, output layer nor log-variance."""
    model = score_model()
    net = model.denoiser.backbone
    encoder, rest = count_calls(net.enc.values()), count_calls([*net.dec.values(), net.out_conv, model.denoiser.logvar])
    x_t, _ = gaussians(3, 1, 8, 8, dtype=torch.float32)
    score = model(x_t, torch.full((3,), 0.7), {"labels": torch.tensor([0, 1, -1])}, denoise=False, logits=True)
    assert score.x0 is None and score.logvar is None and len(score.logits) == 3
    assert encoder == list(net.enc.values()) and rest == []


def test_joint_pass_equals_separate_passes():
    """One pass for image, log-variance and logits runs the network once and gives what separate passes give."""
    model = score_model()
    x_t, _ = gaussians(3, 1, 8, 8, dtype=torch.float32)
    inputs = x_t, torch.tensor([0.1, 0.7, 30.0]), {"labels": torch.tensor([0, 1, -1])}
    image, verdict = model(*inputs), model(*inputs, denoise=False, logits=True)
    calls = count_calls(model.denoiser.backbone.enc.values())
    both = model(*inputs, logits=True)
    assert len(calls) == len(model.denoiser.backbone.enc) and image.logits is None
    assert torch.equal(both.x0, image.x0) and torch.equal(both.logvar, image.logvar) and torch.equal(both.logits, verdict.logits)
    assert torch.equal(both.x0, model.denoiser(*inputs)) and torch.equal(both.logvar, model.denoiser.logvar(inputs[1].log() / 4))


# --- a denoiser on another schedule

PAIRS = {**SCHEDULES, "zero_snr": DiscreteVP(DDPM.betas, zero_terminal_snr=True), "discrete_cosine": DiscreteVP.cosine(256)}


def of_gaussian(schedule, m=0.3, s=0.6):
    """The exact denoiser of N(m, s^2) on its own schedule, which keeps the times that it is called at."""
    def denoiser(x_t, t, cond=None):
        denoiser.times.append(t)
        alpha, sigma = (expand(c, x_t) for c in schedule.alpha_sigma(t))
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)

    denoiser.schedule, denoiser.times = schedule, []
    return denoiser


@pytest.mark.parametrize("there", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("own", PAIRS.values(), ids=PAIRS)
def test_translated_denoiser_is_the_denoiser_of_the_same_data(own, there):
    """The exact denoiser of a Gaussian on one schedule, asked on another, is the exact denoiser there, wherever the two have the same noise."""
    x_t, _ = gaussians(60, 1, 2, 2)
    t = there.time(torch.linspace(0.05, 0.95, 60, dtype=torch.float64))
    alpha, sigma = there.alpha_sigma(t)
    at_first = own.alpha_sigma(1.0 if isinstance(own, DiscreteVP) else own.time(0.0))
    at_last = own.alpha_sigma(own.t_max)
    both = (sigma / alpha >= at_first[1] / at_first[0]) & (sigma / alpha <= at_last[1] / at_last[0])
    x_t = x_t * expand((alpha**2 + sigma**2).sqrt(), x_t)
    found, expected = Translated(of_gaussian(own), there)(x_t, t), of_gaussian(there)(x_t, t)
    assert both.sum() > 20
    assert_close(found[both], expected[both], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", PAIRS.values(), ids=PAIRS)
def test_translation_to_its_own_schedule_changes_nothing(schedule):
    """In training's float32, a denoiser on its own schedule is asked at the time that was meant, with the same image, to rounding."""
    t = schedule.time(torch.linspace(0.02, 1, 50, dtype=torch.float64)).float()
    x_t = schedule.add_noise(*gaussians(50, 1, 2, 2), t.double()).float()
    one, same = of_gaussian(schedule), of_gaussian(schedule)
    assert_close(Translated(one, schedule)(x_t, t), same(x_t, t), rtol=1e-4, atol=1e-4)
    for a, b in zip(schedule.alpha_sigma(one.times[0].double()), schedule.alpha_sigma(t.double())):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own", [DDPM, EDM(), CosineVP(20.0)], ids=["discrete", "edm", "clipped"])
def test_translation_from_beyond_the_ends_asks_at_the_ends(own):
    """Pure noise, which the denoiser has never seen, is asked at its noisiest time, and a cleaner image than any at its cleanest; both finite."""
    one = of_gaussian(own)
    x_t, _ = gaussians(2, 1, 2, 2)
    found = Translated(one, CosineVP())(x_t.float(), torch.tensor([1.0, 1e-7]))
    first = 1.0 if isinstance(own, DiscreteVP) else own.time(0.0)
    assert one.times[0].tolist() == pytest.approx([own.t_max, float(first)], rel=1e-6, abs=1e-6)
    assert found.isfinite().all()
    noise = x_t[0].float() * own.noise_scale(own.t_max)  # of the magnitude that it knows
    assert_close(found[0], of_gaussian(own)(noise[None].float(), torch.tensor([own.t_max]))[0], rtol=1e-3, atol=1e-4)


def test_translation_hands_on_the_condition():
    """The condition reaches the denoiser as it is, and the translation bears the schedule that it is asked on."""
    seen, cond, schedule = [], {"labels": torch.tensor([3])}, CosineVP()
    made = Translated(Denoiser(lambda x, c_noise, cond: seen.append(cond) or x, EDM(), "edm"), schedule)
    made(torch.zeros(1, 1, 2, 2), torch.tensor([0.5]), cond)
    assert seen[0] is cond and made.schedule is schedule


def test_x0_and_eps_together_are_regular_at_both_ends():
    """The exact outputs give x0 at every level. At pure noise x0's half decides alone, and at almost none eps's does."""
    torch.manual_seed(0)
    x0, eps, wrong = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    angle = torch.tensor([1e-6, 0.3, 0.8, 1.3, math.pi / 2], dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    alpha[-1] = 0
    x_t = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
    assert torch.allclose(to_x0("both", from_x0("both", x0, x_t, alpha, sigma), x_t, alpha, sigma), x0, atol=1e-9)
    no_eps, no_x0 = (to_x0("both", torch.cat(pair, dim=1), x_t, alpha, sigma) for pair in ((x0, wrong), (wrong, eps)))
    assert torch.allclose(no_eps[-1], x0[-1]) and torch.allclose(no_x0[0], x0[0], atol=1e-5) and not torch.allclose(no_eps[2], x0[2])
