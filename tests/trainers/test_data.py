"""Images and their order: what a run sees is a function of (seed, images seen), on any number of processes."""

import io
import struct
import zlib
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sentences import check_refused
from sklearn.datasets import load_digits

from trainers import data
from trainers.config import HOUSE, DataConfig
from trainers.data import Order, batches, load_images

DIGITS = DataConfig()
SIZES = {"train": 1437, "test": 360, "all": 1797}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it converts in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(value, size=(8, 8)):
    """A grey picture (width, height) of one value, or of the given pixels."""
    return Image.fromarray(np.broadcast_to(np.asarray(value, dtype=np.uint8), size[::-1]) if np.ndim(value) == 0 else value)


def encoded(image, path=None):
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": path}


def parquet(path, images, labels=None, kind="int64"):
    """A parquet file of images, as `datasets` writes them; images are pictures or encoded rows."""
    columns, features = {"image": images}, {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.Value(kind)
    rows = [i if isinstance(i, dict) else encoded(i) for i in images]
    datasets.Dataset.from_dict({**columns, "image": rows}, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def numbered(path, count, **labels):
    """A parquet file in which image i has the grey value i."""
    return DataConfig(source=parquet(path, [picture(i) for i in range(count)], **labels), classes=0)


def values(images):
    """The grey value of each image of one value."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def take_batches(images, config, count, seed=0, batch=8, start=0, rank=0, world=1):
    stream = batches(images, config, seed, batch, start, rank, world, "cpu")
    return [next(stream) for _ in range(count)]


# --- the embedded digits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SIZES)
def test_digits_are_exact_and_stratified(split):
    """Each split has its size, values v / 8 - 1 of the integers 0 to 16, and every class within one of its fair share."""
    images = load_images(replace(DIGITS, split=split))
    pixels = images.images(range(len(images)))
    assert pixels.shape == (SIZES[split], 1, 8, 8) and len(images) == SIZES[split]
    assert ((pixels + 1) * 8).unique().tolist() == list(range(17))
    shares = np.bincount(load_digits().target) * SIZES[split] / 1797
    assert np.abs(images.labels.bincount().numpy() - shares).max() < 1


def test_digits_split_is_a_partition():
    """Train and test together are the whole set, each digit once, with its label."""
    def rows(split):
        images = load_images(replace(DIGITS, split=split))
        pixels = ((images.images(range(len(images))) + 1) * 8).flatten(1).int().tolist()
        return [(*x, y) for x, y in zip(pixels, images.labels.tolist())]

    whole = [(*x, y) for x, y in zip(load_digits().data.astype(int).tolist(), load_digits().target.tolist())]
    assert rows("all") == whole
    assert sorted(rows("train") + rows("test")) == sorted(whole)


def test_digits_without_classes_have_no_condition():
    """With data.classes 0 a batch has cond None."""
    config = replace(DIGITS, classes=0)
    assert take_batches(load_images(config), config, 1)[0].cond is None


@pytest.mark.parametrize("change, words", [
    ({"resolution": 16}, ("data.resolution is 16", "8")), ({"channels": 3}, ("data.channels is 3", "1")),
    ({"classes": 5}, ("data.classes is 5", "10")), ({"split": "validation"}, ("data.split is validation", "train"))])
def test_digits_in_another_form_are_refused(change, words):
    """What the digits do not have is refused by field and value."""
    with check_refused(*words):
        load_images(replace(DIGITS, **change))


# --- order ---------------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_of_its_own():
    """Each epoch visits every row once, in another order than the last, with coins of its own."""
    order = Order(50, seed=3)
    epochs = [[order(e * 50 + i) for i in range(50)] for e in range(3)]
    assert all(sorted(row for row, _ in epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [coin for _, coin in epochs[0]] != [coin for _, coin in epochs[1]]


def test_order_is_a_function_of_seed_and_position():
    """Any position can be asked for in any sequence, and gives what it gives in a row; another seed gives another order."""
    forward = Order(50, seed=3)
    expected = [forward(p) for p in range(150)]
    jumping = Order(50, seed=3)
    assert [jumping(p) for p in reversed(range(150))] == expected[::-1]
    other = Order(50, seed=4)
    assert [other(p) for p in range(150)] != expected


@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_are_the_same_on_any_number_of_ranks(world):
    """The ranks' parts put together are the images, labels and noise of one process, over an epoch's end."""
    images = load_images(DIGITS)
    start = 1437 - 12
    alone = take_batches(images, DIGITS, 3, start=start)
    ranks = [take_batches(images, DIGITS, 3, start=start, rank=r, world=world) for r in range(world)]
    for step, whole in enumerate(alone):
        parts = [ranks[r][step] for r in range(world)]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.cond["labels"] for p in parts]), whole.cond["labels"])
        assert torch.equal(torch.cat([p.noise.normal(2) for p in parts]), whole.noise.normal(2))


@pytest.mark.parametrize("seen, batch", [(16, 8), (1440, 8), (13, 8), (24, 4)])
def test_stream_goes_on_where_it_stopped(seen, batch):
    """From k images seen, the stream is the one from 0 without its first k samples, whatever the batch."""
    images = load_images(DIGITS)
    whole = take_batches(images, DIGITS, 1 + (seen + 2 * batch) // 96, batch=96)
    noise = torch.cat([b.noise.normal(2) for b in whole])
    pixels, labels = torch.cat([b.images for b in whole]), torch.cat([b.cond["labels"] for b in whole])
    for step, resumed in enumerate(take_batches(images, DIGITS, 2, batch=batch, start=seen)):
        now = slice(seen + step * batch, seen + (step + 1) * batch)
        assert torch.equal(resumed.images, pixels[now]) and torch.equal(resumed.cond["labels"], labels[now])
        assert torch.equal(resumed.noise.normal(2), noise[now])


def test_images_keep_their_labels(tmp_path):
    """Each image comes with the label of its own row."""
    config = replace(numbered(tmp_path / "x.parquet", 12, labels=[i // 3 for i in range(12)]), classes=4)
    for batch in take_batches(load_images(config), config, 5, batch=6):
        assert [value // 3 for value in values(batch.images)] == batch.cond["labels"].tolist()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_microbatches_keep_their_samples(parts):
    """Microbatches have equal size, and the images, condition and noise of their samples."""
    batch = take_batches(load_images(DIGITS), DIGITS, 1)[0]
    micro = batch.split(parts)
    assert [len(m.images) for m in micro] == [8 // parts] * parts
    assert torch.equal(torch.cat([m.images for m in micro]), batch.images)
    assert torch.equal(torch.cat([m.cond["labels"] for m in micro]), batch.cond["labels"])
    assert torch.equal(torch.cat([m.noise.normal(3) for m in micro]), batch.noise.normal(3))
    assert torch.equal(torch.cat([m.noise.fork(1).uniform() for m in micro]), batch.noise.fork(1).uniform())


def test_xflip_mirrors_half():
    """About half of the images are mirrored, each exactly, the same ones every time, and others in the next epoch."""
    def stream(xflip, epoch=0):
        config = replace(DIGITS, split="test", xflip=xflip)
        return take_batches(load_images(config), config, 1, batch=360, start=360 * epoch)[0].images

    plain, flipped = stream(False), stream(True)
    mirrored = (plain != flipped).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(3))
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 360**0.5
    assert torch.equal(stream(True), flipped)
    later = (stream(False, 1) != stream(True, 1)).flatten(1).any(1)
    assert not torch.equal(later, mirrored)


def test_workers_change_nothing():
    """A worker process gives the stream that none gives."""
    config = replace(DIGITS, xflip=True)
    images = load_images(config)
    for a, b in zip(take_batches(images, config, 3), take_batches(images, replace(config, workers=1), 3)):
        assert torch.equal(a.images, b.images) and torch.equal(a.cond["labels"], b.cond["labels"])
        assert torch.equal(a.noise.normal(2), b.noise.normal(2))


# --- folders and parquet ---------------------------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path):
    """A folder with one subfolder a class gives its images, with the classes in alphabetical order."""
    for i, name in enumerate(["ants", "bees"]):
        (tmp_path / "set" / name).mkdir(parents=True)
        for j in range(2):
            picture(100 * i + j).save(tmp_path / "set" / name / f"{j}.png")
    images = load_images(DataConfig(source=str(tmp_path / "set"), classes=2))
    assert sorted(zip(values(images.images(range(4))), images.labels.tolist())) == [(0, 0), (1, 0), (100, 1), (101, 1)]


def test_flat_folder(tmp_path):
    """A folder of images alone is a set without labels."""
    (tmp_path / "set").mkdir()
    for j in range(3):
        picture(j).save(tmp_path / "set" / f"{j}.png")
    images = load_images(DataConfig(source=str(tmp_path / "set"), classes=0))
    assert sorted(values(images.images(range(3)))) == [0, 1, 2] and images.labels is None


def test_folder_with_splits_gives_the_one_asked_for(tmp_path):
    """Of a folder with train and test in it, data.split says which."""
    for i, split in enumerate(["train", "test"]):
        (tmp_path / "set" / split).mkdir(parents=True)
        picture(i).save(tmp_path / "set" / split / "0.png")
    for i, split in enumerate(["train", "test"]):
        assert values(load_images(DataConfig(source=str(tmp_path / "set"), split=split, classes=0)).images([0])) == [i]


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_parquet(tmp_path, monkeypatch, in_memory):
    """A parquet file gives its images, in [-1, 1], and its labels, decoded at the start or as they are used."""
    monkeypatch.setattr(data, "IN_MEMORY", in_memory)
    source = parquet(tmp_path / "x.parquet", [picture(v) for v in (0, 255, 51)], labels=[0, 1, 1])
    images = load_images(DataConfig(source=source, classes=2))
    assert (images.pixels is None) == (in_memory == 0)
    assert torch.equal(images.images([0, 1])[:, 0, 0, 0], torch.tensor([-1.0, 1.0]))
    assert values(images.images([2, 0])) == [51, 0] and images.take([2, 0])[1].tolist() == [1, 0]


@pytest.mark.parametrize("name, channels", [("mnist-test", 1), ("cifar10-test", 3)])
def test_real_parquet(name, channels, monkeypatch):
    """Real sets load: all ten classes, and images that are not blank."""
    file = HOUSE.parent / "shared" / "data" / f"{name}.parquet"
    if not file.is_file():
        pytest.skip(f"{file.name} is not on this machine")
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    images = load_images(DataConfig(source=str(file), resolution=32, channels=channels, fit="pad"))
    assert len(images) == 10_000 and images.labels.unique().tolist() == list(range(10))
    few = images.images(range(0, 10_000, 2500))
    assert few.shape == (4, channels, 32, 32) and few.min() >= -1 and few.max() <= 1 and few.flatten(1).std(1).min() > 0.1


def ramp(width, height):
    """Pixels that all differ."""
    return np.arange(width * height, dtype=np.uint8).reshape(height, width)


def only(tmp_path, image, **config):
    config = DataConfig(**{"source": parquet(tmp_path / "x.parquet", [image]), "classes": 0, **config})
    return ((load_images(config).images([0])[0] + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("width, height", [(8, 8), (16, 8), (8, 14), (11, 8)])
def test_crop_keeps_the_middle_exactly(tmp_path, width, height):
    """Where the shorter side has the right length, "crop" cuts the middle and changes no pixel."""
    pixels, left, top = ramp(width, height), (width - 8) // 2, (height - 8) // 2
    assert np.array_equal(only(tmp_path, picture(pixels))[0], pixels[top:top + 8, left:left + 8])


@pytest.mark.parametrize("width, height", [(32, 16), (16, 48), (5, 4)])
def test_crop_scales_the_shorter_side(tmp_path, width, height):
    """Other sizes are scaled: the middle square of a picture, red on its left half, is red on its left half."""
    pixels = np.zeros((height, width, 3), np.uint8)
    side, left = min(width, height), (width - min(width, height)) // 2
    pixels[:, left:left + side // 2, 0] = 255
    found = only(tmp_path, picture(pixels), channels=3)
    assert (found[0, :, :2] > 240).all() and (found[0, :, 6:] < 15).all() and not found[1:].any()


@pytest.mark.parametrize("width, height, box", [(4, 4, (2, 2)), (8, 5, (0, 1)), (3, 8, (2, 0)), (12, 4, (-2, 2))])
def test_pad_centres_on_black(tmp_path, width, height, box):
    """ "pad" changes no pixel: it centres on black, and cuts what sticks out."""
    wanted = Image.new("L", (8, 8))
    wanted.paste(picture(ramp(width, height) | 1), box)
    assert np.array_equal(only(tmp_path, picture(ramp(width, height) | 1), fit="pad")[0], np.asarray(wanted))


def test_channels_are_converted(tmp_path):
    """Grey becomes three equal channels, and colour its luminance."""
    assert np.array_equal(only(tmp_path, picture(ramp(8, 8)), channels=3), np.stack([ramp(8, 8)] * 3))
    green = np.zeros((8, 8, 3), np.uint8)
    green[..., 1] = 200
    assert (only(tmp_path, picture(green)) == 117).all()  # 0.587 * 200


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "nowhere.parquet"])
def test_missing_source_is_refused(tmp_path, name):
    """A path that is not there is named."""
    with check_refused("data.source", str(tmp_path / name), "no such file"):
        load_images(DataConfig(source=str(tmp_path / name)))


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"hello"}])
def test_folder_without_images_is_refused(tmp_path, content):
    """A folder with nothing, or with other files, in it is named."""
    (tmp_path / "set").mkdir()
    for name, text in content.items():
        (tmp_path / "set" / name).write_bytes(text)
    with check_refused("data.source", str(tmp_path / "set")):
        load_images(DataConfig(source=str(tmp_path / "set"), classes=0))


def test_damaged_parquet_is_refused(tmp_path):
    """A file that is no parquet is named."""
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with check_refused("data.source", str(tmp_path / "x.parquet")):
        load_images(DataConfig(source=str(tmp_path / "x.parquet")))


def test_parquet_without_images_is_refused(tmp_path):
    """Columns that hold no images are listed."""
    datasets.Dataset.from_dict({"text": ["a"], "number": [1]}).to_parquet(tmp_path / "x.parquet")
    with check_refused("data.source", "images", "text, number"):
        load_images(DataConfig(source=str(tmp_path / "x.parquet"), classes=0))


def test_empty_parquet_is_refused(tmp_path):
    """A set of no images is refused."""
    with check_refused("data.source", "x.parquet"):
        load_images(DataConfig(source=parquet(tmp_path / "x.parquet", []), classes=0))


@pytest.mark.parametrize("labels, words", [([0, 7], ("7", "set it to 8")), ([-1, 1], ("below 0", "number its classes from 0"))])
def test_labels_out_of_range_are_refused(tmp_path, labels, words):
    """Labels that data.classes does not cover are refused, with the mend."""
    with check_refused("data.classes is 3", *words):
        load_images(DataConfig(source=parquet(tmp_path / "x.parquet", [picture(0)] * 2, labels), classes=3))


@pytest.mark.parametrize("labels, kind", [(["cat", "dog"], "string"), ([0, None], "int64"), ([0.0, 0.5], "float32")])
def test_labels_that_are_no_numbers_are_refused(tmp_path, labels, kind):
    """Names, gaps and fractions are no class labels."""
    with check_refused("data.classes is 2"):
        load_images(DataConfig(source=parquet(tmp_path / "x.parquet", [picture(0)] * 2, labels, kind), classes=2))


def test_set_without_labels_is_refused(tmp_path):
    """Classes asked of a set without labels are refused, with the mend."""
    with check_refused("data.classes is 2", "no labels", "set data.classes to 0"):
        load_images(DataConfig(source=parquet(tmp_path / "x.parquet", [picture(0)]), classes=2))


def damaged_png():
    """A PNG whose pixels break off at a chunk without a proper name: Pillow raises SyntaxError for it."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(72))[:6]) + chunk(b"\xff\xfe\xfd\xfc", b"")


def huge_bmp():
    """A BMP that claims 60000 x 60000 pixels: Pillow raises DecompressionBombError for it."""
    with io.BytesIO() as file:
        picture(0).save(file, "BMP")
        content = bytearray(file.getvalue())
    content[18:26] = struct.pack("<ii", 60000, 60000)
    return bytes(content)


DAMAGE = {"text": b"not an image", "truncated": encoded(picture(ramp(8, 8)))["bytes"][:50], "broken chunk": damaged_png(),
          "bomb": huge_bmp()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_undecodable_image_is_named(tmp_path, damage):
    """An image that does not decode is refused by name, with the two mends."""
    rows = [encoded(picture(0)), {"bytes": DAMAGE[damage], "path": "broken.png"}]
    with check_refused("broken.png", "data.skip_bad"):
        load_images(DataConfig(source=parquet(tmp_path / "x.parquet", rows), classes=0))


@pytest.mark.parametrize("damage", DAMAGE)
def test_undecodable_image_is_passed_over(tmp_path, damage):
    """With skip_bad only the good images are seen, each with its own label."""
    rows = [picture(10), {"bytes": DAMAGE[damage], "path": "broken.png"}, picture(20), picture(21)]
    config = DataConfig(source=parquet(tmp_path / "x.parquet", rows, labels=[1, 1, 2, 2]), classes=3, skip_bad=True)
    for batch in take_batches(load_images(config), config, 6, batch=4):
        assert [value // 10 for value in values(batch.images)] == batch.cond["labels"].tolist()


def test_set_of_undecodable_images_is_refused(tmp_path):
    """skip_bad does not make a run out of nothing."""
    rows = [{"bytes": b"no", "path": "broken.png"}] * 2
    with check_refused("x.parquet", "decodes"):
        load_images(DataConfig(source=parquet(tmp_path / "x.parquet", rows), classes=0, skip_bad=True))


def test_undecodable_image_in_a_worker_is_named_in_one_sentence(tmp_path, monkeypatch):
    """The refusal is the same sentence where a worker process decodes."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    config = DataConfig(source=parquet(tmp_path / "x.parquet", [{"bytes": b"no", "path": "broken.png"}]), classes=0, workers=1)
    images = load_images(config)
    with check_refused("broken.png", "data.skip_bad"):
        take_batches(images, config, 1, batch=1)
