"""Caches of latents: encoded once, resumable, shared by processes; read anew at each epoch, by position alone."""

import io
import json
import os
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import save_autoencoder
from PIL import Image
from safetensors.torch import load_file
from sentences import check_refused

from models.autoencoder import Autoencoder, Normalisation
from models.noise import Noise
from trainers import data, latents
from trainers.config import DataConfig, RunConfig
from trainers.data import LATENT_STREAM, Order, batches, load_images
from trainers.latents import make_cache
from trainers.shards import Shards

COUNT, PER_FILE, CLASSES = 10, 4, 5  # in files of 4: 4, 4 and 2


@pytest.fixture(autouse=True)
def small_files(tmp_path, monkeypatch):
    """Files of PER_FILE latents of 4 x 4, and `datasets` keeps what it converts in the test's own folder."""
    monkeypatch.setattr(latents, "FILE_BYTES", PER_FILE * 2 * 4 * 4 * 4 * 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def image_set(path, seed=0, bad=(), labels=True):
    """A parquet file of COUNT pictures of 32 x 32, and labels that go round."""
    rows = []
    for pixels in np.random.default_rng(seed).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8):
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, "PNG")
            rows.append({"bytes": b"no" if len(rows) in bad else file.getvalue(), "path": f"{len(rows)}.png"})
    columns, features = {"image": rows}, {"image": datasets.Image()}
    if labels:
        columns["label"], features["label"] = [i % CLASSES for i in range(COUNT)], datasets.Value("int64")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "x.parquet")


def cache(source, autoencoder, out, **settings):
    make_cache(source, autoencoder, str(out), **{"resolution": 32, "classes": CLASSES, "batch": 3, **settings})
    return DataConfig(source=str(out), resolution=4, channels=4, classes=settings.get("classes", CLASSES))


@pytest.fixture
def made(source, tiny_autoencoder, tmp_path):
    """The configuration of a finished cache."""
    return cache(source, tiny_autoencoder, tmp_path / "cache")


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def posteriors(folder):
    """All of a cache's tensors, from its files in order."""
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def take_batches(config, count, seed=0, batch=4, start=0, rank=0, world=1):
    stream = batches(load_images(config), config, seed, batch, start, rank, world, "cpu")
    return [next(stream) for _ in range(count)]


# --- writing -------------------------------------------------------------------------------------------------------------


def test_cache_holds_posteriors_and_labels(made, source, tiny_autoencoder, tmp_path):
    """Row i is the posterior of image i, in float16, and its label; no file is larger than it may be."""
    images = load_images(DataConfig(source=source, resolution=32, channels=3, classes=CLASSES))
    mean, std = Autoencoder(tiny_autoencoder).encode(images.images(range(COUNT)))
    found = posteriors(tmp_path / "cache")
    torch.testing.assert_close(found["mean"], mean.half(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["std"], std.half(), rtol=1e-3, atol=1e-4)
    assert torch.equal(found["label"], images.labels) and found["mean"].dtype == torch.float16
    written = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert [len(load_file(f)["mean"]) for f in written] == [4, 4, 2]
    assert {f.stat().st_mode for f in written} == {(tmp_path / "cache" / "latents.json").stat().st_mode}  # others may read them


def test_index_says_what_the_cache_is(made, source, tiny_autoencoder, tmp_path):
    """Image set, autoencoder, normalisation and count can be read in the index."""
    about = json.loads((tmp_path / "cache" / "latents.json").read_text())
    assert about["source"] == source and about["split"] == "train" and about["resolution"] == 32 and about["classes"] == CLASSES
    assert about["autoencoder"] == Autoencoder(tiny_autoencoder).weights_hash() and about["count"] == COUNT
    assert about["normalisation"]["raw_mean"] == [5.81, 3.25, 0.12, -2.15] and about["latents"] == [4, 4, 4]


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_run_goes_on_where_it_stopped(made, source, tiny_autoencoder, tmp_path, damage):
    """A file that is missing or damaged is refused, then made again bit for bit; the others are not touched."""
    before, broken = files(tmp_path / "cache"), tmp_path / "cache" / "latents-000000004.safetensors"
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:0 if damage == "empty" else -10])
    others = [f for f in (tmp_path / "cache").glob("*.safetensors") if f != broken]
    for f in others:
        os.utime(f, (1, 1))
    with check_refused(str(broken), "missing or damaged", "fewstep cache"):
        load_images(made)
    cache(source, tiny_autoencoder, tmp_path / "cache")
    assert files(tmp_path / "cache") == before and [f.stat().st_mtime for f in others] == [1.0] * len(others)


@pytest.mark.parametrize("after", [0, 2])
def test_interrupted_cache_is_refused_until_it_is_finished(source, tiny_autoencoder, tmp_path, monkeypatch, after):
    """A folder without all of its latents cannot be trained on; running the same command again mends it."""
    write, written = Shards.write, []

    def interrupted(*arguments):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shards, "write", interrupted)
        cache(source, tiny_autoencoder, tmp_path / "cache")
    config = DataConfig(source=str(tmp_path / "cache"), resolution=4, channels=4, classes=CLASSES)
    with check_refused("data.source", str(tmp_path / "cache"), "not finished", "fewstep cache"):
        load_images(config)
    assert len(load_images(cache(source, tiny_autoencoder, tmp_path / "cache"))) == COUNT


def test_ranks_share_the_work(made, source, tiny_autoencoder, tmp_path, monkeypatch):
    """Two ranks write the files of one, each its own part; the folder is refused until the main one is done."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    config = cache(source, tiny_autoencoder, tmp_path / "two")
    written = list((tmp_path / "two").glob("*.safetensors"))
    with check_refused("not finished"):
        load_images(config)
    monkeypatch.setenv("RANK", "0")
    cache(source, tiny_autoencoder, tmp_path / "two")
    assert 0 < len(written) < 3 and files(tmp_path / "two") == files(tmp_path / "cache")


@pytest.mark.parametrize("change", [{"resolution": 16}, {"classes": 0}, {"split": "all"}, {"fit": "pad"}, "source", "autoencoder"])
def test_cache_of_something_else_is_refused(made, source, tiny_autoencoder, tmp_path, change):
    """A folder is not filled up with latents that do not belong together, and stays as it is."""
    before = files(tmp_path / "cache")
    source = image_set(tmp_path / "other.parquet", seed=1) if change == "source" else source
    autoencoder = save_autoencoder(tmp_path / "other", seed=1) if change == "autoencoder" else tiny_autoencoder
    with check_refused(str(tmp_path / "cache"), "another image set or autoencoder"):
        cache(source, autoencoder, tmp_path / "cache", **(change if isinstance(change, dict) else {}))
    assert files(tmp_path / "cache") == before


def test_workers_that_decode_ahead_change_nothing(made, source, tiny_autoencoder, tmp_path):
    """The files are the same bytes."""
    cache(source, tiny_autoencoder, tmp_path / "ahead", workers=1)
    assert files(tmp_path / "ahead") == files(tmp_path / "cache")


def test_undecodable_images(tiny_autoencoder, tmp_path):
    """They are refused by name, or passed over: then the next image, with its label, stands for them."""
    source = image_set(tmp_path / "x.parquet", bad=[3])
    with check_refused("3.png"):
        cache(source, tiny_autoencoder, tmp_path / "cache")
    cache(source, tiny_autoencoder, tmp_path / "cache", skip_bad=True)
    found = posteriors(tmp_path / "cache")
    assert found["label"].tolist() == [0, 1, 2, 4, 4, 0, 1, 2, 3, 4]
    torch.testing.assert_close(found["mean"][3], found["mean"][4], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("settings, words", [
    ({"resolution": 20}, ("resolution is 20", "8")), ({"batch": 0}, ("batch is 0",)), ({"classes": 3}, ("data.classes is 3", "5")),
    ({"split": "test", "source": "nowhere.parquet"}, ("nowhere.parquet",)), ({"source": "digits"}, ("digits",))])
def test_settings_that_cannot_work_are_refused(source, tiny_autoencoder, tmp_path, settings, words):
    """The setting is named."""
    with check_refused(*words):
        cache(settings.pop("source", source), tiny_autoencoder, tmp_path / "cache", **settings)


def test_cache_of_a_cache_is_refused(made, tiny_autoencoder, tmp_path):
    """Latents are not encoded again."""
    with check_refused(made.source, "cache of latents"):
        cache(made.source, tiny_autoencoder, tmp_path / "again")


# --- reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_latents_are_drawn_and_normalised(made, tmp_path, monkeypatch, in_memory):
    """A sample's latent is mean + std * eps with the noise of its own position, normalised by EDM2's constants, from memory or from the files."""
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    images, found = load_images(made), posteriors(tmp_path / "cache")
    assert (images.pixels is None) == (in_memory == 0)
    stream, order = batches(images, made, 7, COUNT, 0, 0, 1, "cpu"), Order(COUNT, 7)
    for step in range(2):
        batch, positions = next(stream), range(step * COUNT, (step + 1) * COUNT)
        rows = [order(p)[0] for p in positions]
        eps = Noise(7, LATENT_STREAM, positions).normal(4, 4, 4)
        wanted = Normalisation().normalize(found["mean"][rows].float() + found["std"][rows].float() * eps)
        assert batch.images.dtype == torch.float32
        torch.testing.assert_close(batch.images, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(batch.cond["labels"], found["label"][rows])


def test_latents_follow_the_posterior(made, tmp_path):
    """Over many samples a row's latents have the posterior's mean and standard deviation, scaled by 0.5 / raw std."""
    found, n = posteriors(tmp_path / "cache"), 4000
    drawn = load_images(made).take([2] * n, Noise(0, LATENT_STREAM, range(n)))[0]
    wanted = found["std"][2].float() * 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28]).view(-1, 1, 1)
    assert ((drawn.mean(0) - Normalisation().normalize(found["mean"][2])).abs() < 6 * wanted / n**0.5).all()
    assert ((drawn.std(0) / wanted - 1).abs() < 0.1).all()


def test_each_epoch_draws_anew_and_the_same_again(made):
    """Two epochs hold the same rows with other noise, and a second reading the same latents, labels and noise; another seed has others."""
    first, again, other = (take_batches(made, 2, batch=COUNT, seed=seed) for seed in (0, 0, 1))
    assert not torch.isin(first[0].images, first[1].images).any() and not torch.isin(first[0].images, other[0].images).any()
    assert sorted(first[0].cond["labels"].tolist()) == sorted(first[1].cond["labels"].tolist())
    for a, b in zip(first, again):
        assert torch.equal(a.images, b.images) and torch.equal(a.cond["labels"], b.cond["labels"])


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
@pytest.mark.parametrize("world", [2, 4])
def test_latents_are_the_same_on_any_number_of_ranks(made, monkeypatch, in_memory, world):
    """The ranks' parts put together are the latents of one process, over an epoch's end, and whatever the start."""
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    whole = torch.cat([batch.images for batch in take_batches(made, 6)])
    ranks = [take_batches(made, 5, start=4, rank=rank, world=world) for rank in range(world)]
    found = torch.cat([torch.cat([ranks[rank][step].images for rank in range(world)]) for step in range(5)])
    assert torch.equal(found, whole[4:])


def test_workers_change_nothing(made, monkeypatch):
    """A worker process reads what none reads, also after the main one has opened files."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    images = load_images(made)
    images.first(COUNT)
    alone, ahead = (batches(images, replace(made, workers=n), 0, 4, 0, 0, 1, "cpu") for n in (0, 1))
    for _ in range(3):
        assert torch.equal(next(alone).images, next(ahead).images)


def test_first_latents_are_reproducible(made):
    """Those that samples are compared with do not change, and are no more than there are."""
    (a, labels), (b, _) = load_images(made).first(50), load_images(made).first(50)
    assert torch.equal(a, b) and a.shape == (COUNT, 4, 4, 4) and labels.tolist() == [i % CLASSES for i in range(COUNT)]


def test_labels_may_be_left_alone_or_absent(made, tiny_autoencoder, tmp_path):
    """With data.classes 0 there is no condition, whether the cache has labels or not; asked of one without, they are refused."""
    assert take_batches(replace(made, classes=0), 1)[0].cond is None
    bare = cache(image_set(tmp_path / "x.parquet", labels=False), tiny_autoencoder, tmp_path / "bare", classes=0)
    assert take_batches(bare, 1)[0].cond is None
    with check_refused("data.classes is 5", str(tmp_path / "bare"), "0"):
        load_images(replace(bare, classes=5))


@pytest.mark.parametrize("change, words", [
    ({"resolution": 32}, ("data.resolution is 32", "set it to 4")), ({"channels": 3}, ("data.channels is 3", "set it to 4")),
    ({"classes": 6}, ("data.classes is 6", "5")), ({"xflip": True}, ("data.xflip",)), ({"streaming": True}, ("data.streaming",))])
def test_configuration_that_disagrees_with_the_cache_is_refused(made, change, words):
    """The field is named, and what to set it to."""
    with check_refused(*words):
        load_images(replace(made, **change))


@pytest.mark.parametrize("content, word", [("{no", "damaged"), ('{"words": 3}', "not the index")])
def test_damaged_index_is_refused(made, tmp_path, content, word):
    """An index that is none is named."""
    (tmp_path / "cache" / "latents.json").write_text(content)
    with check_refused("latents.json", word):
        load_images(made)


def test_channels_go_with_the_kind_of_source(made, tmp_path):
    """Four channels are for latents and for nothing else."""
    RunConfig(out=str(tmp_path / "out"), data=made).check(1)
    with check_refused("data.channels is 3", "4"):
        load_images(replace(made, channels=3))
    with check_refused("data.channels is 4", "1"):
        load_images(DataConfig(channels=4))
