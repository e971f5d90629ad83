"""Noise-image pairs: a function of teacher and seed, resumable, shared by processes."""

import os

import pytest
import torch
from sentences import check_refused

from models import hub
from models.denoiser import Denoiser
from models.edm2_unet import EDM2UNet, LogVar
from models.noise import Noise
from models.sampling import heun
from models.schedules import EDM
from trainers import pairs
from trainers.pairs import Pairs, make_pairs

COUNT = 10  # in files of 4: 4, 4 and 2


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(pairs, "PER_FILE", 4)


def teacher(folder, seed=0, classes=10, sampler=None):
    """A tiny EDM2 network, not trained, whose output is not zero."""
    torch.manual_seed(seed)
    size = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16)
    unet = EDM2UNet(8, 1, classes, **size)
    denoiser = Denoiser(unet, EDM(sigma_data=0.75), "edm", LogVar())
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.5)
    hub.save(folder, {**hub.describe(denoiser), "sampler": sampler or {"type": "heun", "steps": 3}}, denoiser.state_dict())
    return str(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return teacher(tmp_path_factory.mktemp("second") / "model", seed=1)


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_pair_is_noise_image_and_label(first, tmp_path):
    """Pair i is sample i's noise, what the teacher's sampler makes of it, and label i mod classes."""
    make_pairs(first, str(tmp_path), COUNT, seed=3)
    found = Pairs(str(tmp_path), seed=0).tensors
    labels = torch.arange(COUNT) % 10
    noise = Noise(3, 0, range(COUNT)).normal(1, 8, 8)
    assert torch.equal(found["noise"], noise) and torch.equal(found["label"], labels)
    image = heun(hub.load_denoiser(first), noise, 3, {"labels": labels})
    torch.testing.assert_close(found["image"], image, rtol=0, atol=1e-4)
    assert image.std(0).min() > 1e-3  # a teacher whose images differ


def test_labels_repeat_and_may_be_absent(tmp_path):
    """With 3 classes labels go round; with none there is no label and no condition."""
    make_pairs(teacher(tmp_path / "three", classes=3), str(tmp_path / "a"), 7)
    assert Pairs(str(tmp_path / "a"), 0).tensors["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    make_pairs(teacher(tmp_path / "none", classes=0), str(tmp_path / "b"), 2)
    found = Pairs(str(tmp_path / "b"), 0)
    assert set(found.tensors) == {"noise", "image"} and found.take(range(2), "cpu")[2] is None


def test_pairs_are_deterministic(first, second, tmp_path):
    """The same teacher and seed give the same bytes; another seed, or another teacher, other images."""
    for name, path, seed in (("a", first, 0), ("b", first, 0), ("seed", first, 1), ("teacher", second, 0)):
        make_pairs(path, str(tmp_path / name), 4, seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    images = {name: Pairs(str(tmp_path / name), 0).tensors["image"] for name in ("a", "seed", "teacher")}
    assert not torch.equal(images["a"], images["seed"]) and not torch.equal(images["a"], images["teacher"])


def test_batch_changes_nothing(first, tmp_path):
    """Noise and labels are exactly those of another batch size, and images the same to rounding."""
    make_pairs(first, str(tmp_path / "a"), 4, batch=4)
    make_pairs(first, str(tmp_path / "b"), 4, batch=3)
    a, b = (Pairs(str(tmp_path / name), 0).tensors for name in "ab")
    assert torch.equal(a["noise"], b["noise"]) and torch.equal(a["label"], b["label"])
    torch.testing.assert_close(a["image"], b["image"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_run_goes_on_where_it_stopped(first, tmp_path, damage):
    """A file that is missing or damaged is made again, bit for bit; the others are not touched."""
    make_pairs(first, str(tmp_path), COUNT)
    before = files(tmp_path)
    broken = tmp_path / "pairs-000000004.safetensors"
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:0 if damage == "empty" else -10])
    others = [f for f in tmp_path.glob("*.safetensors") if f != broken]
    for f in others:
        os.utime(f, (1, 1))
    with check_refused(str(broken), "missing or damaged"):
        Pairs(str(tmp_path), 0)
    make_pairs(first, str(tmp_path), COUNT)
    assert files(tmp_path) == before and [f.stat().st_mtime for f in others] == [1.0] * len(others)


@pytest.mark.parametrize("count", [3, 4, 9, 13])
def test_count_may_change(first, tmp_path, count):
    """Asked again for more pairs, or fewer, the folder holds what it would have held at once; no file need be full."""
    make_pairs(first, str(tmp_path / "a"), 6)
    make_pairs(first, str(tmp_path / "a"), count)
    make_pairs(first, str(tmp_path / "b"), count)
    a, b = (Pairs(str(tmp_path / name), 0).tensors for name in "ab")
    assert len(a["image"]) == count and torch.equal(a["noise"], b["noise"]) and torch.equal(a["label"], b["label"])
    torch.testing.assert_close(a["image"], b["image"], rtol=0, atol=1e-4)


def test_ranks_share_the_work(first, tmp_path, monkeypatch):
    """Two ranks write the files of one, each its own part; the folder is refused until the main one is done."""
    make_pairs(first, str(tmp_path / "one"), COUNT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    make_pairs(first, str(tmp_path / "two"), COUNT)
    written = files(tmp_path / "two")
    with check_refused("no finished pairs"):
        Pairs(str(tmp_path / "two"), 0)
    monkeypatch.setenv("RANK", "0")
    make_pairs(first, str(tmp_path / "two"), COUNT)
    assert 0 < len([name for name in written if name.startswith("pairs-")]) < 3
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_pairs_of_another_teacher_or_seed_are_refused(first, second, tmp_path):
    """A folder is not filled up with pairs that do not belong together, and stays as it is."""
    make_pairs(first, str(tmp_path), 4)
    before = files(tmp_path)
    for path, seed in ((second, 0), (first, 1)):
        with check_refused(str(tmp_path), "another teacher, sampler or seed"):
            make_pairs(path, str(tmp_path), COUNT, seed)
    assert files(tmp_path) == before


def interrupt(monkeypatch, after):
    """From now on, making pairs is interrupted once so many files are written."""
    write, written = pairs.Shards.write, []

    def interrupted(*arguments):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(1)
        write(*arguments)

    monkeypatch.setattr(pairs.Shards, "write", interrupted)


def test_interrupted_pairs_of_another_teacher_are_refused(first, second, tmp_path, monkeypatch):
    """That holds for a folder whose making was interrupted, too."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=1)
        make_pairs(first, str(tmp_path), COUNT)
    assert (tmp_path / "pairs-000000000.safetensors").is_file()
    for path, seed in ((second, 0), (first, 1)):
        with check_refused(str(tmp_path), "another teacher, sampler or seed"):
            make_pairs(path, str(tmp_path), COUNT, seed)


@pytest.mark.parametrize("after", [0, 2])
def test_interrupted_pairs_are_refused_until_they_are_finished(first, tmp_path, monkeypatch, after):
    """A folder without all of its pairs cannot be trained on; running the same command again mends it."""
    with check_refused("regression.pairs", str(tmp_path), "fewstep pairs"):
        Pairs(str(tmp_path), 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after)
        make_pairs(first, str(tmp_path), COUNT)
    with check_refused(str(tmp_path), "fewstep pairs"):
        Pairs(str(tmp_path), 0)
    make_pairs(first, str(tmp_path), COUNT)
    assert len(Pairs(str(tmp_path), 0).tensors["image"]) == COUNT


def test_few_step_student_is_refused(tmp_path):
    """Pairs come from a deterministic many-step sampler."""
    student = teacher(tmp_path / "student", sampler={"type": "few_step", "timesteps": [10.0]})
    with check_refused(student, "few-step"):
        make_pairs(student, str(tmp_path / "pairs"), 4)


@pytest.mark.parametrize("count", [0, -5])
def test_count_without_pairs_is_refused(first, tmp_path, count):
    """A count that is not above 0 is named."""
    with check_refused(f"count is {count}"):
        make_pairs(first, str(tmp_path), count)


def test_take_keeps_pairs_together(first, tmp_path):
    """Samples get whole pairs, each epoch all of them in its own order, from the run's seed and the sample's number alone."""
    make_pairs(first, str(tmp_path), COUNT)
    found = Pairs(str(tmp_path), seed=1)
    noise, image, cond = found.take(range(2 * COUNT), "cpu")
    rows = [next(i for i in range(COUNT) if torch.equal(found.tensors["noise"][i], z)) for z in noise]
    assert torch.equal(image, found.tensors["image"][rows]) and cond["labels"].tolist() == [i % 10 for i in rows]
    assert sorted(rows[:COUNT]) == sorted(rows[COUNT:]) == list(range(COUNT)) and rows[:COUNT] != rows[COUNT:]
    assert torch.equal(Pairs(str(tmp_path), seed=1).take(range(7, 12), "cpu")[0], noise[7:12])
    assert not torch.equal(Pairs(str(tmp_path), seed=2).take(range(2 * COUNT), "cpu")[0], noise)
