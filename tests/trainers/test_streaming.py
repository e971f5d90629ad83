"""Streamed sets: read from front to back, and yet what a run sees is a function of (seed, images seen), on any number of processes."""

import io
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sentences import check_refused

from trainers import data
from trainers.config import DataConfig
from trainers.data import batches, load_images

COUNT = 24  # the picture with number i is grey, of value i, and has label i // 6
KINDS = ("parquet", "folder")


@pytest.fixture(autouse=True)
def small_buffers(tmp_path, monkeypatch):
    """Rows are mixed among few, and `datasets` keeps what it converts in the test's own folder."""
    monkeypatch.setattr(data, "SHUFFLED", {"bytes": 8, "paths": 8})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def encoded(value):
    with io.BytesIO() as file:
        Image.fromarray(np.broadcast_to(np.asarray(value, dtype=np.uint8), (8, 8))).save(file, "PNG")
        return file.getvalue()


def parquet(path, rows, labels=None, kind=None, group=4):
    """A parquet file of rows {"bytes", "path"}, in groups of a few."""
    columns, features = {"image": rows}, {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, kind or datasets.Value("int64")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path, batch_size=group)
    return DataConfig(source=str(path), classes=4 if labels else 0, streaming=True)


def numbered(path, bad=(), **settings):
    rows = [{"bytes": b"no" if i in bad else encoded(i), "path": f"{i}.png"} for i in range(COUNT)]
    return replace(parquet(path, rows, [i // 6 for i in range(COUNT)]), **settings)


def folder(path):
    for i in range(COUNT):
        (path / f"class{i // 6}").mkdir(parents=True, exist_ok=True)
        (path / f"class{i // 6}" / f"{i:02d}.png").write_bytes(encoded(i))
    return DataConfig(source=str(path), classes=4, streaming=True)


@pytest.fixture(params=KINDS)
def config(request, tmp_path):
    return numbered(tmp_path / "x.parquet") if request.param == "parquet" else folder(tmp_path / "x")


def values(images):
    """The grey value of each image of one value."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def take_batches(config, count, seed=0, batch=8, start=0, rank=0, world=1):
    stream = batches(load_images(config), config, seed, batch, start, rank, world, "cpu")
    return [next(stream) for _ in range(count)]


def order(config, count=3 * COUNT, **settings):
    """The numbers of the first images of a stream."""
    return [value for batch in take_batches(config, count // 8, **settings) for value in values(batch.images)]


def test_stream_is_the_set_of_the_same_name(config):
    """An epoch is the images and labels of the set that is not streamed, each once."""
    (batch,) = take_batches(config, 1, batch=COUNT)
    images = load_images(replace(config, streaming=False))
    whole = sorted(zip(values(images.images(range(COUNT))), images.labels.tolist()))
    assert sorted(zip(values(batch.images), batch.cond["labels"].tolist())) == whole == [(i, i // 6) for i in range(COUNT)]
    assert batch.images.shape == (COUNT, 1, 8, 8) and batch.images.dtype == torch.float32


def test_order_is_a_function_of_seed_and_epoch(config):
    """Each epoch is a permutation of its own, the same every time; another seed has others."""
    found = order(config)
    epochs = [found[i:i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert order(config) == found != order(config, seed=1) and epochs[1] != order(config, seed=1)[:COUNT]


@pytest.mark.parametrize("world", [2, 4])
def test_steps_are_the_same_on_any_number_of_ranks(config, world):
    """The ranks' parts put together are the images, labels and noise of one process, over an epoch's end."""
    alone = take_batches(config, 5)
    ranks = [take_batches(config, 5, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(world)]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.cond["labels"] for p in parts]), whole.cond["labels"])
        assert torch.equal(torch.cat([p.noise.normal(2) for p in parts]), whole.noise.normal(2))


@pytest.mark.parametrize("seen", [8, 21, 24, 30, 51])
@pytest.mark.parametrize("counted", [True, False])
def test_stream_goes_on_where_it_stopped(config, monkeypatch, seen, counted):
    """From k images seen, the stream is the one from 0 without its first k, whether the set says how many images it has or not."""
    whole = order(config, 9 * 8)
    monkeypatch.setattr(data, "_count", lambda rows, config: COUNT if counted else None)
    assert order(config, 16, start=seen) == whole[seen:seen + 16]


def test_parquet_says_how_many_there_are(tmp_path):
    """So that earlier epochs need not be read to go on."""
    assert load_images(numbered(tmp_path / "x.parquet")).count == COUNT


def test_sorted_file_is_mixed(tmp_path):
    """Of a file that is sorted by class, even the first images are of several: its row groups are shuffled, and its rows among neighbours."""
    config = numbered(tmp_path / "x.parquet")
    assert len({value // 6 for value in order(config, 8)}) > 2
    starts = {order(config, 8, seed=seed)[0] // 4 for seed in range(12)}  # of which row group
    assert len(starts) > 3


def test_images_keep_their_labels_and_classes_may_be_left_out(config):
    """Each image comes with its own label, and with data.classes 0 without one."""
    for batch in take_batches(config, 4):
        assert [value // 6 for value in values(batch.images)] == batch.cond["labels"].tolist()
    assert take_batches(replace(config, classes=0), 1)[0].cond is None


def test_xflip_mirrors_half(tmp_path):
    """About half of the images are mirrored, each exactly, the same ones on any rank, and others in the next epoch."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    plain = parquet(tmp_path / "x.parquet", [{"bytes": encoded(ramp + i), "path": None} for i in range(100)])
    whole, flipped = (take_batches(replace(plain, xflip=flag), 2, batch=100) for flag in (False, True))
    mirrored = [(a.images != b.images).flatten(1).any(1) for a, b in zip(whole, flipped)]
    assert torch.equal(flipped[0].images[mirrored[0]], whole[0].images[mirrored[0]].flip(3))
    assert abs(mirrored[0].float().mean() - 0.5) < 4 * 0.5 / 10 and not torch.equal(*mirrored)
    part = take_batches(replace(plain, xflip=True), 1, batch=100, rank=1, world=2)[0]
    assert torch.equal(part.images, flipped[0].images[50:])


def test_workers_change_nothing(tmp_path):
    """Worker processes give the stream that none gives, however many there are."""
    config = numbered(tmp_path / "x.parquet", bad=[5], skip_bad=True, xflip=True)
    for a, b in zip(take_batches(config, 5), take_batches(replace(config, workers=2), 5)):
        assert torch.equal(a.images, b.images) and torch.equal(a.cond["labels"], b.cond["labels"])
        assert torch.equal(a.noise.normal(2), b.noise.normal(2))


def test_first_is_the_set_once(config):
    """No more than there are, each once, with its label, and the same every time."""
    images, labels = load_images(config).first(1000)
    assert sorted(values(images)) == list(range(COUNT)) and labels.tolist() == [value // 6 for value in values(images)]
    few, _ = load_images(config).first(5)
    assert torch.equal(few, images[:5]) and values(few) != list(range(5))


def test_splits_are_told_apart(tmp_path):
    """Of a folder with train and test in it, data.split says which, and "all" is both."""
    for i, split in enumerate(["train", "test"]):
        (tmp_path / "set" / split).mkdir(parents=True)
        (tmp_path / "set" / split / "0.png").write_bytes(encoded(i))
    for split, wanted in (("train", [0]), ("test", [1]), ("all", [0, 1])):
        config = DataConfig(source=str(tmp_path / "set"), split=split, classes=0, streaming=True)
        assert sorted(values(load_images(config).first(9)[0])) == wanted
    with check_refused("data.split is validation", "train", "test"):
        load_images(replace(config, split="validation"))


def test_image_at_an_address(tmp_path):
    """A row that holds an address instead of an image is fetched, as those of sets on the hub are."""
    (tmp_path / "x.png").write_bytes(encoded(77))
    config = parquet(tmp_path / "x.parquet", [{"bytes": None, "path": f"file://{tmp_path}/x.png"}] * 2)
    assert values(load_images(config).first(2)[0]) == [77, 77]


# --- what is refused, or passed over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_undecodable_images_are_passed_over(tmp_path, world):
    """With skip_bad the next image of the stream, with its label, stands for one that does not decode: on any number of ranks."""
    bad = [0, 7, 8, 9, 23]
    good = order(numbered(tmp_path / "good.parquet"), 6 * 8)
    config = numbered(tmp_path / "bad.parquet", bad=bad, skip_bad=True)
    wanted = [next(value for value in good[i:] if value not in bad) for i in range(4 * 8)]
    ranks = [take_batches(config, 4, rank=rank, world=world) for rank in range(world)]
    found = [batch for step in zip(*ranks) for batch in step]
    assert [value for batch in found for value in values(batch.images)] == wanted
    assert [label for batch in found for label in batch.cond["labels"].tolist()] == [value // 6 for value in wanted]


@pytest.mark.parametrize("workers", [1, 0])
def test_undecodable_image_is_named(tmp_path, workers):
    """Without skip_bad it is refused by name, in one sentence, wherever it is decoded."""
    config = numbered(tmp_path / "x.parquet", bad=[5], workers=workers)
    with check_refused("5.png", "data.skip_bad"):
        take_batches(config, 3)


def test_stream_of_undecodable_images_is_refused(tmp_path):
    """skip_bad does not make a run out of nothing."""
    config = numbered(tmp_path / "x.parquet", bad=range(COUNT), skip_bad=True)
    with check_refused("x.parquet", "decodes"):
        take_batches(config, 1)


def image_rows(count=2):
    return [{"bytes": encoded(0), "path": None}] * count


@pytest.mark.parametrize("labels, kind, words", [
    ([0, 7], None, ("7", "set it to 8")), ([-1, 1], None, ("-1",)), (["cat", "dog"], datasets.Value("string"), ("whole numbers",)),
    ([0, None], None, ("whole numbers",)), ([0.5, 0.5], datasets.Value("float32"), ("whole numbers",)),
    ([0, 1], datasets.ClassLabel(num_classes=7), ("set it to 7",))])
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, kind, words):
    """By their range or their kind, at the latest when they turn up."""
    config = parquet(tmp_path / "x.parquet", image_rows(), labels, kind)
    with check_refused("data.classes is 4", *words):
        take_batches(config, 1)


def test_set_without_labels_is_refused(tmp_path):
    """Classes asked of a set without labels are refused, with the mend."""
    with check_refused("data.classes is 2", "no labels", "set data.classes to 0"):
        load_images(replace(parquet(tmp_path / "x.parquet", image_rows()), classes=2))


@pytest.mark.parametrize("kind", ["missing", "missing folder", "damaged", "empty", "empty folder", "no images"])
def test_source_that_is_no_image_set_is_refused(tmp_path, kind):
    """The source is named at the start, not at the first step."""
    path = tmp_path / ("set" if "folder" in kind else "x.parquet")
    if kind == "damaged":
        path.write_bytes(b"PAR1 no more")
    elif kind == "empty":
        parquet(path, [])
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "no images":
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(path)
    with check_refused("data.source", str(path)):
        load_images(DataConfig(source=str(path), classes=0, streaming=True))


def test_digits_are_no_stream():
    """The embedded set is in memory."""
    with check_refused("data.streaming", "digits"):
        load_images(DataConfig(streaming=True))
