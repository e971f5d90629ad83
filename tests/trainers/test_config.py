"""Configuration: what wins, what is refused, and what a resumed run must agree with."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sentences import check_refused

from trainers.config import HOUSE, DataConfig, LoopConfig, RunConfig, check_same_run, load_config, write_config
from trainers.dmd import DmdConfig
from trainers.edm2 import Edm2Config
from trainers.optim import OptimConfig
from trainers.trainer import Trainer


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, given as YAML values or as text; returns its path."""
    def write(content):
        (tmp_path / "made.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(tmp_path / "made.yaml")

    return write


def edm2(*argv):
    return load_config(Edm2Config, [str(a) for a in argv], "digits_edm2", "edm2")


def dmd(*argv):
    return load_config(DmdConfig, [str(a) for a in argv], "digits_dmd", "dmd")


# --- precedence --------------------------------------------------------------------------------------------------------------


def test_command_line_beats_recipe_beats_defaults(recipe):
    """A field is what the command line says, else the recipe, else the default; sections are merged field by field."""
    path = recipe({"method": "edm2", "images": 7, "P_mean": -0.5, "loop": {"batch": 32, "keep": 5}})
    config = edm2("--recipe", path, "--loop.batch", 16, "--P_mean", -1.5)
    assert config == Edm2Config(recipe=path, out="runs/made", images=7, P_mean=-1.5, loop=LoopConfig(batch=16, keep=5))


def test_options_take_both_forms(recipe):
    """--name=value and --name value are the same."""
    path = recipe({})
    joined = edm2(f"--recipe={path}", "--images=5", "--data.xflip=true")
    apart = edm2("--recipe", path, "--images", 5, "--data.xflip", "true")
    assert joined == apart and joined.images == 5


def test_default_recipe_is_used_where_none_is_given():
    """The bare command is the default recipe."""
    assert edm2() == edm2("--recipe", "digits_edm2") == edm2("--recipe", HOUSE / "recipes" / "digits_edm2.yaml")
    assert edm2().images == yaml.safe_load((HOUSE / "recipes" / "digits_edm2.yaml").read_text())["images"]


def test_recipe_sets_every_kind_of_value(recipe):
    """Numbers, YAML's 1e-4 among them, lists of any length, booleans, null and sections arrive as the types of their fields."""
    times = [80.0 - i / 8 for i in range(100)]
    path = recipe(f"timesteps: {times}\nguidance: 2\nteacher: null\ndata: {{xflip: true}}\n"
                  "generator: {lr: 1e-4, betas: [0, 0.9]}")
    config = dmd("--recipe", path)
    assert config == DmdConfig(recipe=path, out="runs/made", timesteps=tuple(times), guidance=2.0, data=DataConfig(xflip=True),
                               generator=OptimConfig(lr=1e-4, betas=(0.0, 0.9)))


STRINGS = ["plain", "/data/my images", "2024", "null", "on", "a: b", "#1", "it's", "/a folder" * 12]


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: text[:12])
def test_strings_arrive_as_they_are(recipe, text):
    """A string of a recipe or of the command line is taken literally, whatever YAML would make of it bare."""
    assert edm2("--recipe", recipe({"data": {"source": text}})).data.source == text
    assert edm2("--recipe", recipe({}), "--data.source", text).data.source == text


def test_bare_date_is_a_string(recipe):
    """A name that YAML takes for a date, such as that of a day's run, arrives as it was written."""
    assert edm2("--recipe", recipe("out: 2026-11-20")).out == "2026-11-20"


@pytest.mark.parametrize("path", sorted((HOUSE / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_for_its_method(path, tmp_path):
    """A recipe of the house names its method, and passes that method's checks on one process."""
    method = yaml.safe_load(path.read_text())["method"]
    trainer = next(v for v in vars(importlib.import_module(f"trainers.{method}")).values()
                   if isinstance(v, type) and issubclass(v, Trainer) and v is not Trainer and v.method == method)
    argv = ["--recipe", path.stem, "--out", str(tmp_path / "run")]
    config = load_config(trainer.config_class, argv, trainer.default_recipe, method)
    config.check(1)
    assert config.recipe == str(path)


# --- what is refused while reading ---------------------------------------------------------------------------------------------


def test_unknown_recipe_is_refused():
    """The nearest recipe is offered, and all are listed."""
    with check_refused("digits_edm", "did you mean digits_edm2?", "digits_dmd"):
        edm2("--recipe", "digits_edm")


@pytest.mark.parametrize("content, key, nearest", [
    ({"imags": 5}, "imags", "images"), ({"loop": {"bach": 5}}, "loop.bach", "loop.batch"), ({"data": "digits"}, "data", "data."),
    ({"optimiser": {"lr": 1}}, "optimiser.lr", "optimizer.lr")])
def test_unknown_recipe_key_is_refused(recipe, content, key, nearest):
    """The key is named with its section, the file too, and the nearest is offered."""
    path = recipe(content)
    with check_refused(path, f"unknown key {key}", f"did you mean {nearest}"):
        edm2("--recipe", path)


@pytest.mark.parametrize("option, nearest", [
    ("--imags", "images"), ("--loop.bach", "loop.batch"), ("--optimizer.learning_rate", "optimizer."),
    ("--sampling-steps", "sampling_steps")])
def test_unknown_option_is_refused(option, nearest):
    """The option is named, and the nearest is offered; abbreviations are not taken."""
    with check_refused(f"{option} is unknown", f"did you mean {nearest}"):
        edm2(option, 5)
    with check_refused("--imag is unknown"):
        edm2("--imag=5")


@pytest.mark.parametrize("field, value", [
    ("images", "many"), ("images", "1.5"), ("loop.batch", "64x"), ("sigma_data", "half"), ("data.xflip", "perhaps"),
    ("optimizer.betas", "[0.9]"), ("ema.sigma_rel", "[wide]")])
def test_wrong_type_is_refused(recipe, field, value):
    """The field and the value are named, in the recipe as on the command line."""
    with check_refused(field, value.strip("[]")):
        edm2(f"--{field}", value)
    section, _, name = field.rpartition(".")
    content = yaml.safe_load(value)
    with check_refused(field, value.strip("[]")):
        edm2("--recipe", recipe({section: {name: content}} if section else {name: content}))


@pytest.mark.parametrize("argv", [["--images"], ["--images", "--seed", "3"], ["--loop.batch", "8", "--recipe"]])
def test_missing_value_is_refused(argv):
    """An option without its value is named."""
    with check_refused("--images" if "--images" in argv else "--recipe"):
        edm2(*argv)


@pytest.mark.parametrize("argv", [["digits_edm2"], ["-n", "5"]])
def test_stray_words_are_refused(argv):
    """A word that belongs to no option is named."""
    with check_refused(argv[0]):
        edm2(*argv)


def test_recipe_of_another_method_is_refused():
    """Both methods are named."""
    with check_refused("digits_dmd", "trainers/dmd.py", "trainers/edm2.py"):
        edm2("--recipe", "digits_dmd")


@pytest.mark.parametrize("content", ["a: [", "- images\n- 5", "images", "5", "\tx: 1"])
def test_file_that_is_no_recipe_is_refused(recipe, content):
    """A file that is not YAML, or not a mapping, is named."""
    path = recipe(content)
    with check_refused(path):
        edm2("--recipe", path)


def test_binary_recipe_is_refused(tmp_path):
    """A file that is not text, such as weights given for a recipe, is named."""
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe\x00\x01")
    with check_refused("model.safetensors"):
        edm2("--recipe", tmp_path / "model.safetensors")


# --- what is refused before anything is built -----------------------------------------------------------------


@pytest.mark.parametrize("world, batch, take", [(4, 10, 12), (3, 64, 66), (8, 4, 8)])
def test_batch_that_processes_cannot_share_is_refused(tmp_path, world, batch, take):
    """The batch, the processes and the next batch that works are named."""
    with check_refused(f"loop.batch is {batch}", f"{world} processes", f"take {take}"):
        RunConfig(out=str(tmp_path), loop=LoopConfig(batch=batch)).check(world)


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_batch_that_does_not_divide_into_microbatches_is_refused(tmp_path, network):
    """Accumulation of each network counts, with the processes; one that divides passes, and gives the microbatch."""
    config = DmdConfig(out=str(tmp_path), loop=LoopConfig(batch=12), **{network: OptimConfig(accumulation=4)})
    config.check(1)
    assert config.micro_batch(network, 1, 4) == 3
    with check_refused("loop.batch is 12", f"{network}.accumulation 4", "2 processes", "take 16"):
        config.check(2)
    with check_refused(f"{network}.accumulation is 0"):
        replace(config, **{network: OptimConfig(accumulation=0)}).check(1)


def test_output_that_cannot_be_written_is_refused(tmp_path):
    """A folder below a file, and a file itself, are no places for a run."""
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        with check_refused(f"out is {out}", "--out"):
            RunConfig(out=str(out)).check(1)


def test_writable_leaves_nothing_behind(tmp_path):
    """A run's folder is made, and is empty."""
    RunConfig(out=str(tmp_path / "a" / "b")).check(1)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("options", [
    "--images 0", "--loop.batch 0", "--eval.fd_resolution 3", "--eval.fd_resolution 16", "--loop.keep 0", "--loop.log_every -1", "--eval.samples 0", "--eval.batch 0",
    "--data.resolution 12", "--data.fit stretch", "--data.channels 0", "--data.channels 2", "--data.classes -1",
    "--data.workers -1", "--sampling_steps 0", "--sigma_data 0", "--network.channel_mult [1,1,1,1,1]",
    "--network.channels_per_head 64", "--optimizer.lr -0.1", "--optimizer.accumulation 0",
    "--ema.sigma_rel [0.5]", "--ema.halflife [0.0]"])
def test_value_that_cannot_work_is_refused(tmp_path, options):
    """Before any network is built, the field is named."""
    config = edm2("--out", tmp_path, *options.split())
    with check_refused(options.split()[0].removeprefix("--")):
        config.check(1)


@pytest.mark.parametrize("options", [
    "--fake_updates 0", "--score_range [0.5,0.5]", "--score_range [-0.1,0.5]", "--fake_time cosine", "--timesteps [1,5]",
    "--guidance 2 --data.classes 0", "--regression.distance l1", "--regression.pairs null --regression.weight 0.25",
    "--ema.sigma_rel [0.3]", "--generator.lr -0.1", "--fake_score.accumulation 0"])
def test_dmd_value_that_cannot_work_is_refused(tmp_path, options):
    """Before any network is built, the field is named."""
    config = dmd("--out", tmp_path, *options.split())
    with check_refused(options.split()[0].removeprefix("--")):
        config.check(1)


# --- beside the weights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """A run that has written its configuration and a checkpoint."""
    config = dmd("--out", tmp_path / "run", "--teacher", "some/teacher")
    (tmp_path / "run" / "checkpoints" / "000000000128").mkdir(parents=True)
    write_config(config)
    return config


def test_written_config_is_complete(started, tmp_path):
    """config.yaml holds every field, so that it makes the same config when used as a recipe, and what made the run."""
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {"command", "commit", "python", "torch", "accelerate", "deepspeed", "fewstep"} <= set(written["about"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(written["config"]))
    assert replace(dmd("--recipe", tmp_path / "again.yaml"), recipe=started.recipe) == started


def test_config_is_written_without_git(started, tmp_path, monkeypatch):
    """A machine that has no git trains all the same: the commit is null."""
    monkeypatch.setenv("PATH", str(tmp_path))
    write_config(started)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["about"]["commit"] is None


@pytest.mark.parametrize("options", [
    "", "--images 999", "--loop.log_every 1", "--loop.save_every 1", "--loop.eval_every 1", "--loop.keep 9",
    "--eval.samples 10", "--data.workers 3"])
def test_same_run_goes_on(started, options):
    """The same command again continues a run, and so does one that changes how long, how often or how it is watched."""
    check_same_run(dmd("--out", started.out, "--teacher", "some/teacher", *options.split()))


@pytest.mark.parametrize("option, given, before, now", [
    ("seed", "5", "0", "5"), ("loop.batch", "64", "128", "64"), ("generator.lr", "0.1", "0.005", "0.1"),
    ("data.xflip", "true", "False", "True"),
    ("ema.sigma_rel", "[0.2]", "[0.14]", "[0.2]"), ("teacher", "another", "some/teacher", "another")])
def test_another_run_in_its_folder_is_refused(started, option, given, before, now):
    """The field is named with both values, and the mend."""
    with check_refused(f"{started.out} holds a run with {option} {before}, and this one has {now}", "--out"):
        check_same_run(dmd("--out", started.out, "--teacher", "some/teacher", f"--{option}", given))


def test_run_without_checkpoint_may_change(tmp_path):
    """A run that never saved anything is begun anew, whatever its configuration was."""
    config = dmd("--out", tmp_path)
    write_config(config)
    check_same_run(replace(config, seed=5))
    check_same_run(replace(config, out=str(tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere").exists()


def test_config_survives_a_kill_while_it_is_written(started, monkeypatch):
    """A run killed while it writes config.yaml again can still be continued."""
    def killed(path, text, *_, **__):
        with open(path, "w") as file:
            file.write(text[:40])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        write_config(started)
    check_same_run(started)
