"""Real launches, on two processes of this machine: every way to shard is the same training, and the documented commands work."""

import json
from pathlib import Path

import pytest
import torch

from conftest import HOUSE, launch, run
from models.hub import description, load_denoiser
from trainers.checkpoint import _Reader
from trainers.config import load_config
from trainers.data import load_images
from trainers.engine import Cluster
from trainers.launch import Plan
from trainers.progressive import Progressive, ProgressiveConfig

# Adam's eps is large, so that rounding is not blown up to whole steps; clips are tight, so that clipping is at work.
TINY = ("--loop.batch=8", "--loop.log_every=8", "--loop.eval_every=0", "--generator.warmup_images=0", "--fake_score.warmup_images=0",
        "--generator.lr=1e-3", "--fake_score.lr=1e-3", "--generator.eps=1e-4", "--fake_score.eps=1e-4", "--generator.clip=0.1", "--fake_score.clip=0.2")
ACCUMULATE = ("--generator.accumulation=2", "--fake_score.accumulation=4")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU are not supported by NCCL")


def state_of(out: Path) -> dict[tuple, torch.Tensor]:
    """Everything in the last checkpoint, put together from its shards: masters, moments, averages of both networks."""
    folder = max((out / "checkpoints").glob("0*"))
    manifest, found = json.loads((folder / "manifest.json").read_text()), {}
    for network in manifest["engines"]:
        read = _Reader([folder / f for f in manifest["files"] if f.startswith(f"{network}/")])
        for (kind, name), pieces in read.pieces.items():
            found[network, kind, name] = read(kind, name, 0, sum(p.get_shape()[0] for _, p in pieces))
    return found


def difference(a: Path, b: Path, kinds: tuple = ("master", "ema-power-0.140")) -> float:
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a if k[1] in kinds)


@pytest.fixture(scope="module")
def plain(tiny_teacher, tmp_path_factory) -> Path:
    """Five iterations, three of them with a generator update and the GAN on, in one process without accumulation."""
    out = tmp_path_factory.mktemp("plain") / "run"
    launch("cpu.yaml", "dmd.py", "--teacher", tiny_teacher, "--out", out, "--images=40", *TINY)
    return out


def test_training_moves_the_weights(plain, tiny_teacher):
    """The runs compared below move masters by far more than they may differ."""
    start = dict(load_denoiser(str(tiny_teacher)).named_parameters())
    for (network, kind, name), value in state_of(plain).items():
        if kind == "master" and name.endswith("conv_res0.weight"):
            before = start[name.removeprefix("denoiser.")].flatten()
            assert (value - before / before.square().mean().sqrt()).abs().max() > 5e-4


@CPU_ONLY
@pytest.mark.parametrize("config, flags", [("cpu_ddp.yaml", ()), *(("cpu_zero.yaml", ("--zero_stage", stage, "--")) for stage in "123")],
                         ids=["ddp", "zero1", "zero2", "zero3"])
def test_sharded_training_is_plain_training(plain, tiny_teacher, tmp_path, config, flags):
    """Two processes, each accumulating at its networks' own rates, end where one process does: masters and averages to 1e-5."""
    launch(config, "dmd.py", *flags, "--teacher", tiny_teacher, "--out", tmp_path / "run", "--images=40", *TINY, *ACCUMULATE)
    assert difference(plain, tmp_path / "run") < 1e-5


@CPU_ONLY
def test_zero3_resumes_bit_for_bit_and_on_another_sharding(plain, tiny_teacher, tmp_path):
    """ZeRO-3 interrupted equals ZeRO-3 uninterrupted, exactly; a checkpoint of two ZeRO-3 processes goes on in one plain process."""
    common = ("--teacher", tiny_teacher, *TINY)
    zero3 = ("cpu_zero.yaml", "dmd.py", "--zero_stage", "3", "--", *common)
    launch(*zero3, "--out", tmp_path / "whole", "--images=40")
    launch(*zero3, "--out", tmp_path / "parts", "--images=24")
    run("cp", "-r", tmp_path / "parts", tmp_path / "across")
    launch(*zero3, "--out", tmp_path / "parts", "--images=40")
    assert difference(tmp_path / "whole", tmp_path / "parts", ("master", "exp_avg", "exp_avg_sq", "ema-power-0.140")) == 0
    launch("cpu.yaml", "dmd.py", *common, "--out", tmp_path / "across", "--images=40")
    assert difference(plain, tmp_path / "across") < 1e-5


@CPU_ONLY
def test_bfloat16_zero_keeps_float32_masters(tiny_teacher, tmp_path):
    """Under bfloat16 ZeRO-2 masters are no bfloat16 numbers, follow the float32 run, and resume exactly."""
    flags = ("--mixed_precision", "bf16", "--")
    for out, images in (("whole", 40), ("parts", 24), ("parts", 40)):
        launch("cpu_zero.yaml", "dmd.py", *flags, "--teacher", tiny_teacher, "--out", tmp_path / out, f"--images={images}", *TINY)
    assert difference(tmp_path / "whole", tmp_path / "parts", ("master", "exp_avg", "exp_avg_sq", "ema-power-0.140")) == 0
    master = state_of(tmp_path / "whole")["generator", "master", "backbone.out_conv.weight"]
    assert not torch.equal(master, master.bfloat16().float())


def test_plain_run_resumes_bit_for_bit(plain, tiny_teacher, tmp_path):
    """Interrupted and started again with the same command, a run ends in the same bytes, and its log has no line twice."""
    for images in (24, 40):
        launch("cpu.yaml", "dmd.py", "--teacher", tiny_teacher, "--out", tmp_path / "run", f"--images={images}", *TINY)
    assert difference(plain, tmp_path / "run", ("master", "exp_avg", "exp_avg_sq", "ema-power-0.140")) == 0
    assert (plain / "model/model.safetensors").read_bytes() == (tmp_path / "run/model/model.safetensors").read_bytes()
    seen = [json.loads(line)["images_seen"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert seen == [8, 16, 24, 32, 40]


def test_the_missions_command(tiny_teacher, tmp_path):
    """`accelerate launch trainers/dmd.py --config accelerate_configs/8gpu.yaml` runs with what there is, says so once, and gives the same teacher line."""
    done = run("accelerate", "launch", "trainers/dmd.py", "--config", "accelerate_configs/8gpu.yaml", "--images=256", "--loop.eval_every=0",
               "--out", tmp_path / "run", "--pretrain.out", tiny_teacher)
    assert (done.stdout + done.stderr).count("asks for 8 processes") == (1 if torch.cuda.device_count() < 8 else 0)
    assert f"teacher: none given, reusing {tiny_teacher}" in done.stdout
    assert (tmp_path / "run/model/model.safetensors").is_file()


@CPU_ONLY
def test_script_config_on_two_processes_is_the_launchers_config(plain, tiny_teacher, tmp_path):
    """`accelerate launch --multi_gpu --num_processes 2 script --config F` shards as F says, like `--config_file F script`."""
    run("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "trainers/dmd.py", "--config",
        "accelerate_configs/cpu_zero.yaml", "--teacher", tiny_teacher, "--out", tmp_path / "run", "--images=40", *TINY)
    assert difference(plain, tmp_path / "run") < 1e-5
    manifest = json.loads((max((tmp_path / "run/checkpoints").glob("0*")) / "manifest.json").read_text())
    assert manifest["world"] == 2 and "cur_scale" in manifest["engines"]["generator"]["loss_scale"]  # DeepSpeed's own


def test_a_teacher_is_pretrained_where_none_is_given(tmp_path):
    """Without a teacher, the recipe's own is trained first, by its trainer, and then used."""
    recipe = tmp_path / "teacher.yaml"
    recipe.write_text((HOUSE / "recipes/digits_edm2.yaml").read_text().replace("images: 150000", "images: 128"))
    done = launch("cpu.yaml", "dmd.py", "--images=128", "--loop.eval_every=0", "--out", tmp_path / "run",
                  f"--pretrain.recipe={recipe}", f"--pretrain.out={tmp_path / 'teacher'}")
    assert f"teacher: none given, pretraining one with the recipe {recipe}" in done.stdout
    assert (tmp_path / "teacher/model/model.safetensors").is_file() and (tmp_path / "run/model/model.safetensors").is_file()


@CPU_ONLY
@pytest.mark.parametrize("flags", [("--zero_stage", "2", "--mixed_precision", "bf16", "--"), ("--zero_stage", "3", "--")], ids=["zero2-bf16", "zero3"])
def test_a_sharded_run_that_blows_up_stops_with_its_checkpoint_intact(tiny_teacher, tmp_path, flags):
    """A learning rate that breaks the fake score after a checkpoint: updates are refused on every rank, the run ends with code 1, the masters are finite."""
    common = ("--teacher", tiny_teacher, "--out", tmp_path / "run", *TINY, "--loop.save_every=8")
    blown = launch("cpu_zero.yaml", "dmd.py", *flags, *common, "--images=400", "--fake_score.lr=1e38", check=False)
    assert blown.returncode == 1 and "10 updates of fake_score in a row" in blown.stderr and "last good checkpoint is" in blown.stderr
    refused = [json.loads(line)["fake_score/refused"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert refused[0] == 0 and refused[-1] >= 10
    assert all(value.isfinite().all() for (network, kind, _), value in state_of(tmp_path / "run").items() if network == "generator")


LADDER = ("--stages", '{"from": 8, "to": 2, "images": 24}', "--loop.batch=8", "--loop.log_every=8", "--loop.eval_every=0", "--student.lr=1e-3",
          "--student.eps=1e-4", "--student.clip=0.1", "--ema.sigma_rel=[0.14]")


def plain_ladder(teacher: Path, out: Path) -> Path:
    """Two stages of three steps each in this process, without accumulation."""
    config = load_config(ProgressiveConfig, [*LADDER, "--teacher", str(teacher), "--out", str(out)], "digits_progressive", "progressive")
    config.check(1)
    Progressive(Progressive.prepare(config), Cluster(Progressive.networks, Plan.read(None)), load_images(config.data)).fit()
    return out


@CPU_ONLY
@pytest.mark.parametrize("config, flags, stops", [("cpu_ddp.yaml", (), (48,)), ("cpu_zero.yaml", ("--zero_stage", "3", "--"), (32, 48))], ids=["ddp", "zero3"])
def test_a_sharded_ladder_is_a_plain_one(tiny_teacher, tmp_path, fresh_accelerator, config, flags, stops):
    """Two processes, accumulating, hand a student over and end where one process does, to 1e-5: masters, averages and both stages' weights; under ZeRO-3
    interrupted in the second stage."""
    plain, out = plain_ladder(tiny_teacher, tmp_path / "plain"), tmp_path / "run"
    for images in stops:
        launch(config, "progressive.py", *flags, "--teacher", tiny_teacher, "--out", out, *LADDER, "--student.accumulation=2", f"--images={images}")
    assert difference(plain, out) < 1e-5
    start = load_denoiser(str(tiny_teacher)).state_dict()
    for steps in ("00004", "00002"):
        a, b = (load_denoiser(str(run / "stages" / steps)).state_dict() for run in (plain, out))
        assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5 and max((a[n] - start[n]).abs().max() for n in a) > 5e-4
    assert description(str(out))["sampler"] == description(str(plain))["sampler"] and len(state_of(out)) == len(state_of(plain))


@pytest.mark.parametrize("arguments, said", [
    (("--recipe", "digits_dmx"), "recipe digits_dmx is unknown (did you mean digits_dmd?)"),
    (("--generator.lrr", "1"), "--generator.lrr is unknown (did you mean generator.lr?)"),
    (("--loop.batch", "many"), "loop.batch"),
    (("--teacher", "/nowhere"), "/nowhere: there is no model there"),
    (("--data.source", "/nowhere"), "data.source is /nowhere"),
    (("--config", "/nowhere.yaml"), "--config /nowhere.yaml: there is no such file"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(tiny_teacher, tmp_path, arguments, said):
    """As a user sees it: no traceback, one line, code 2."""
    done = run("python", HOUSE / "trainers/dmd.py", "--out", tmp_path / "run", *(() if "--teacher" in arguments else ("--teacher", tiny_teacher)),
               *arguments, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and said in errors[0] and "Traceback" not in done.stderr


@pytest.mark.parametrize("teacher, code, said", [("there", 0, "ready"), ("/nowhere", 2, "/nowhere: there is no model there")])
def test_check_says_what_a_machine_lacks(tiny_teacher, tmp_path, teacher, code, said):
    """`--check` looks for the data and the teacher, trains nothing, and makes no folder but the run's own."""
    done = run("python", HOUSE / "trainers/dmd.py", "--check", "--out", tmp_path / "run", "--teacher", tiny_teacher if teacher == "there" else teacher, check=False)
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_sigterm_checkpoints_and_the_same_command_goes_on(tiny_teacher, tmp_path):
    """A run that is asked to stop saves at its next report, says how to go on with code 130, and continues from there."""
    import os
    import signal
    import subprocess
    import sys
    import time

    command = [sys.executable, HOUSE / "trainers/dmd.py", "--teacher", tiny_teacher, "--out", tmp_path / "run", "--images=800000", *TINY]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run/metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again" in err
    stopped = int(max((tmp_path / "run/checkpoints").glob("0*")).name)
    done = launch("cpu.yaml", "dmd.py", "--teacher", tiny_teacher, "--out", tmp_path / "run", f"--images={stopped + 16}", *TINY)
    assert f"resuming {tmp_path / 'run'} at {stopped} images" in done.stdout
