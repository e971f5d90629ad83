"""NVlabs snapshots: what was pickled is what is read, bit for bit, and nothing that a file holds is ever run.

The snapshots are written here, with stand-ins that bear the names of NVlabs' classes. None of NVlabs' code is needed.
"""

import copyreg
import gc
import io
import pickle
import pickletools
import random
import shutil
import struct
import sys
import threading
import tracemalloc
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from models import hub, snapshots
from models.edm2_unet import EDM2UNet, LogVar, from_nvlabs
from models.edm_unet import NETWORKS, from_edm
from models.hub import ModelError, load_denoiser
from models.snapshots import load_nvlabs, read_nvlabs

CONFIG = dict(img_resolution=8, img_channels=2, label_dim=3, use_fp16=True, sigma_data=0.75, logvar_channels=16, model_channels=8,
              channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8, dropout=0.1)
EDM_CONFIG = dict(img_resolution=8, img_channels=2, label_dim=3, use_fp16=False, sigma_min=0.0, sigma_max=float("inf"), sigma_data=0.75,
                  augment_dim=4, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.1, label_dropout=0.1)
EDM_KINDS = {
    "ddpmpp": dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard"),
    "ncsnpp": dict(model_type="SongUNet", embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1], label_dropout=0),
    "adm": dict(model_type="DhariwalUNet", model_channels=64, label_dim=0),
}
FEW = {"w": torch.arange(6.0).reshape(2, 3).half(), "enc.block.gain": torch.tensor(0.5).half(), "enc.freqs": torch.ones(4).half()}


# --- writing snapshots

def _reconstruct_persistent_obj(meta):
    raise AssertionError("a snapshot was unpickled")


class EasyDict(dict):
    pass


STAND_INS = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
for module, thing in STAND_INS.items():
    thing.__module__ = module


class Persistent:
    """Pickles as an instance of one of NVlabs' classes. `source` is what their loader would execute."""

    def __init__(self, name, state, source="raise AssertionError('source of a snapshot was executed')", version=6):
        self.meta = {"type": "class", "version": version, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


def modules(tensors, kwargs=None, name="MPConv"):
    """The modules that have these tensors: `enc` and `dec` are ModuleDicts, names in -s are buffers, None stays None."""
    state = dict(nn.Module().__dict__) | {"_parameters": {}, "_buffers": {}, "_modules": OrderedDict(), "training": False}
    state |= {"_init_args": (), "_init_kwargs": dict(kwargs or {})}
    for key, value in tensors.items():
        if "." not in key and key.endswith("s"):
            state["_buffers"][key] = value
        elif "." not in key:
            state["_parameters"][key] = value if value is None else nn.Parameter(value, requires_grad=False)
    for child in dict.fromkeys(key.split(".")[0] for key in tensors if "." in key):
        inner = modules({key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{child}.")})
        state["_modules"][child] = inner
        if child in ("enc", "dec"):
            state["_modules"][child] = nn.ModuleDict()
            state["_modules"][child].__dict__.update((k, v) for k, v in inner.meta["state"].items() if not k.startswith("_init"))
    return Persistent(name, state)


def few(config=CONFIG, name="Precond"):
    """A network of a few tensors, which is enough for reading."""
    return modules(FEW, config, name)


def write(path, thing, protocol=4):
    """Pickle with the stand-ins importable, by NVlabs' names, for as long as that takes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in STAND_INS.items():
            patch.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
            patch.setitem(sys.modules, name, ModuleType(name))
            setattr(sys.modules[name], stand_in.__name__, stand_in)
        path.write_bytes(pickle.dumps(thing, protocol))
    return str(path)


def snapshot(tmp_path, ema=None, protocol=4, **parts):
    """The path of a snapshot: of these modules, or else of a few tensors."""
    encoder = Persistent("StabilityVAEEncoder", {"scale": np.ones(4, np.float32), "std": np.float32(0.5), "_vae": None})
    loss = Persistent("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0})
    whole = EasyDict(encoder=encoder, dataset_kwargs=EasyDict(path="images.zip"), loss_fn=loss, ema=ema or few())
    return write(tmp_path / "snapshot.pkl", EasyDict(whole | parts), protocol)


def holding(tmp_path, value):
    """The path of a snapshot in whose network `value` stands where a tensor should."""
    ema = few()
    ema.meta["state"]["_parameters"]["w"] = value
    return snapshot(tmp_path, ema)


def public_state(**settings):
    """A network's tensors as snapshots have them: NVlabs' names, half precision, gains without dimensions."""
    torch.manual_seed(0)
    config = {k: v for k, v in (CONFIG | settings).items() if k not in ("use_fp16", "sigma_data", "logvar_channels")}
    net, logvar = EDM2UNet(**config), LogVar(16)
    state = {f"unet.{k}": v for k, v in net.state_dict().items()} | {f"logvar_{k}": v for k, v in logvar.state_dict().items()}
    return {k: torch.rand([]).half() if k.endswith("gain") else v.half() for k, v in state.items()}


def edm_state(kind):
    """An EDM network's constructor's arguments, and its tensors as its snapshots have them: NVlabs' names, in float32."""
    torch.manual_seed(0)
    config = EDM_CONFIG | EDM_KINDS[kind]
    outside = ("use_fp16", "sigma_min", "sigma_max", "sigma_data", "label_dropout", "model_type")
    net = NETWORKS[config["model_type"]](**{k: v for k, v in config.items() if k not in outside})
    return config, {f"model.{k}": v for k, v in net.state_dict().items()}


def refusal(path, read=read_nvlabs):
    """What is said of a file that is refused: one printable line, after the file's name."""
    with pytest.raises(ModelError) as refused:
        read(str(path))
    message = str(refused.value)
    assert message.isprintable() and len(message) < 500 and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def same(found, expected):
    """Same names, types and bits."""
    alike = (v.dtype == expected[k].dtype and torch.equal(v, expected[k]) for k, v in found.items())
    return found.keys() == expected.keys() and all(alike)


AUDIT = {"installed": False, "thread": None, "events": set()}


def audit(event, _):
    if AUDIT["thread"] == threading.get_ident():
        AUDIT["events"].add(event)


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """A reader that, of all that Python audits (imports, code that is run, processes, ...), may open files, and no more."""
    if not AUDIT["installed"]:
        AUDIT["installed"] = True  # for good, since Python removes no such hook
        sys.addaudithook(audit)
    read_nvlabs(snapshot(tmp_path))  # what torch does at its first use,
    "".encode("raw-unicode-escape")  # and Python, where pickletools meets a kind of text that is then refused
    AUDIT["events"].clear()
    monkeypatch.chdir(tmp_path)

    def audited(path):
        gc.disable()  # other tests' objects may have finalizers
        AUDIT["thread"] = threading.get_ident()
        try:
            return read_nvlabs(str(path))
        finally:
            AUDIT["thread"] = None
            gc.enable()

    yield audited
    assert AUDIT["events"] <= {"open"} and [p.name for p in tmp_path.iterdir()] == ["snapshot.pkl"]


# --- whole files

@pytest.mark.parametrize("protocol", [4, 5])
def test_round_trip(tmp_path, nothing_runs, protocol):
    """Arguments and tensors are read as they were written, by the protocols of Python 3.8 and of 3.14."""
    state = public_state()
    config, found = nothing_runs(snapshot(tmp_path, modules(state, CONFIG, "Precond"), protocol))
    assert config == CONFIG and same(found, state) and len(found) > 40


def test_denoiser_is_that_of_the_tensors(tmp_path):
    """A snapshot's denoiser is what `from_nvlabs` makes of the same tensors, frozen, with or without the hub in between."""
    state = public_state()
    path, expected = snapshot(tmp_path, modules(state, CONFIG, "Precond")), from_nvlabs(CONFIG, state)
    denoiser, found = load_nvlabs(path)
    assert same(denoiser.state_dict(), expected.state_dict()) and same(load_denoiser(path).state_dict(), expected.state_dict())
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters())
    x_t, t, cond = torch.randn(2, 2, 8, 8), torch.tensor([0.1, 20.0]), {"labels": torch.tensor([-1, 2])}
    assert torch.equal(denoiser(x_t, t, cond), expected(x_t, t, cond))
    assert found == hub.description(path) == {**hub.describe(expected), "sampler": {"type": "heun", "steps": 32}}
    assert all(part in found for part in hub.PARTS) and (found["resolution"], found["channels"], found["classes"]) == (8, 2, 3)


def test_network_without_labels(tmp_path):
    """Where a module is None, as the label embedding of an unconditional network may be, there is no tensor."""
    state = public_state(label_dim=0)
    config = CONFIG | {"label_dim": 0}
    path = snapshot(tmp_path, modules(state | {"unet.emb_label": None}, config, "Precond"))
    assert same(read_nvlabs(path)[1], state) and load_nvlabs(path)[1]["classes"] == 0


def test_tensors_are_their_own(tmp_path):
    """A tensor that was read can be written to, and is contiguous, whatever part of a storage it was."""
    ema = modules({"w": torch.arange(12.0).half().reshape(3, 4)[1:, ::2].t()}, CONFIG, "Precond")
    found = read_nvlabs(snapshot(tmp_path, ema))[1]["w"]
    assert found.is_contiguous() and found.tolist() == [[4, 8], [6, 10]]
    found.zero_()


def test_tuples_become_lists(tmp_path):
    """A list among the arguments that was given as a tuple is a list again, as in JSON."""
    config = read_nvlabs(snapshot(tmp_path, few(CONFIG | {"channel_mult": (1, 2)})))[0]
    assert config == CONFIG and type(config["channel_mult"]) is list


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_round_trip_of_edm(tmp_path, nothing_runs, kind):
    """A snapshot of EDM is read as it was written, and its denoiser is that of the tensors, frozen, as a saved folder too."""
    config, state = edm_state(kind)
    path = snapshot(tmp_path, modules(state, config, "EDMPrecond"))
    found_config, found_state = nothing_runs(path)
    assert found_config == config and same(found_state, state) and len(state) > 40
    expected = from_edm(config, state)
    denoiser, found = load_nvlabs(path)
    assert same(denoiser.state_dict(), expected.state_dict()) and same(load_denoiser(path).state_dict(), expected.state_dict())
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters()) and denoiser.schedule.sigma_data == 0.75
    unconditional = {"unconditional": config["label_dropout"] > 0}
    assert found == hub.description(path) == {**hub.describe(expected), "sampler": {"type": "heun", "steps": 18}, **unconditional}
    hub.save(tmp_path / "folder" / "model", found, denoiser.state_dict())
    x_t, t, cond = torch.randn(2, 2, 8, 8), torch.tensor([0.1, 20.0]), {"labels": torch.tensor([-1, 2])}
    assert torch.equal(load_denoiser(str(tmp_path / "folder"))(x_t, t, cond), expected(x_t, t, cond))
    shutil.rmtree(tmp_path / "folder")  # for `nothing_runs`, which looks for what a file may have left


def test_edm_is_not_edm2(tmp_path):
    """A network under the other's class name is refused by what does not fit."""
    config, state = edm_state("ddpmpp")
    assert "argument" in refusal(snapshot(tmp_path, modules(state, config, "Precond")), load_nvlabs)
    assert "argument" in refusal(snapshot(tmp_path, modules(public_state(), CONFIG, "EDMPrecond")), load_nvlabs)


@pytest.mark.parametrize("damage, said", [
    (lambda state: state.pop("model.map_layer0.bias"), "model.map_layer0.bias"),
    (lambda state: state.update({"model.map_layer0.offset": state.pop("model.map_layer0.bias")}), "model.map_layer0.bias"),
    (lambda state: state.update({"map_layer0.bias": state.pop("model.map_layer0.bias")}), "model.map_layer0.bias"),
    (lambda state: state.pop("model.enc.4x4_down.conv0.resample_filter"), "resample_filter"),
    (lambda state: state.update({"model.map_augment.weight": torch.ones(2, 2)}), "model.map_augment.weight"),
], ids=["missing", "renamed", "no-prefix", "no-filter", "shape"])
def test_tensors_of_another_edm(tmp_path, damage, said):
    """A tensor of an EDM network that is missing, renamed or of another shape is refused in one sentence, by its name."""
    config, state = edm_state("ddpmpp")
    damage(state)
    path = snapshot(tmp_path, modules(state, config, "EDMPrecond"))
    assert all(said in refusal(path, read) for read in (load_nvlabs, load_denoiser, hub.description))


@pytest.mark.parametrize("changes, said", [
    ({"num_blocks": 10**6}, "too few"), ({"model_type": "UNet"}, "UNet"), ({"encoder_type": "other"}, "encoder_type"), ({"depth": 3}, "depth"),
    ({"resample_filter": []}, ""), ({"resample_filter": [1, 3, 3, 1]}, "size mismatch"), ({"augment_dim": 2**31 - 1}, "size mismatch"),
    ({"label_dropout": None}, ""), ({"embedding_type": None}, "embedding_type"),
], ids=repr)
def test_arguments_of_another_edm(tmp_path, changes, said):
    """Arguments that do not belong to an EDM network's tensors are refused, all before its memory is taken."""
    config, state = edm_state("ddpmpp")
    path = snapshot(tmp_path, modules(state, config | changes, "EDMPrecond"))
    assert all(said in refusal(path, read) for read in (load_nvlabs, load_denoiser, hub.description))


@pytest.mark.parametrize("changes, said", [
    ({"channel_mult": ["ab"] * 2, "model_channels": 2**31 - 1}, "channel_mult"),
    ({"model_channels": [8], "channel_mult": [2**31 - 1] * 2}, "model_channels"),
    ({"model_channels": "8", "channel_mult": [2**31 - 1] * 2}, "model_channels"), ({"channel_mult": "12"}, "channel_mult"),
], ids=repr)
@pytest.mark.parametrize("name", ["Precond", "EDMPrecond"])
def test_arguments_that_repeat_a_list(tmp_path, name, changes, said):
    """A list or a string among the sizes, which Python would repeat billions of times, is refused by its name, and takes no memory."""
    config, state = edm_state("ddpmpp") if name == "EDMPrecond" else (CONFIG, public_state())
    path = snapshot(tmp_path, modules(state, config | changes, name))
    tracemalloc.start()
    try:
        assert said in refusal(path, hub.description)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Generator", "precond", "Precond\n\x1b[31m", "P" * 10_000])
def test_another_architecture(tmp_path, name):
    """A snapshot of another network is refused, and the message says which it is, and which ones are read."""
    said = refusal(snapshot(tmp_path, few(name=name)))
    assert repr(name[:80]) in said and "'EDMPrecond'" in said and "'Precond'" in said


PARTS = ("_init_args", "_init_kwargs", "_parameters", "_buffers", "_modules")


@pytest.mark.parametrize("change", [
    lambda ema: ema.meta.update(version=5), lambda ema: ema.meta.pop("version"), lambda ema: ema.meta.pop("class_name"),
    lambda ema: ema.meta.pop("state"), lambda ema: ema.meta.update(state=[]), lambda ema: ema.meta.update(class_name=["Precond"]),
    *(lambda ema, part=part: ema.meta["state"].pop(part) for part in PARTS),
    lambda ema: ema.meta["state"].update(_modules=[]), lambda ema: ema.meta["state"].update(_init_args=(8, 2, 3)),
    lambda ema: ema.meta["state"]["_modules"].update(enc=3), lambda ema: ema.meta["state"]["_modules"]["enc"].__dict__.clear(),
    lambda ema: ema.meta["state"]["_modules"].update({"\x1b[31m" * 1000: None}),
    lambda ema: ema.meta["state"]["_parameters"].update(w=3),
    lambda ema: ema.meta["state"]["_parameters"].update({"a.b": ema.meta["state"]["_parameters"]["w"]}),
])
def test_missing_parts(tmp_path, nothing_runs, change):
    """A network that lacks a part, or has one of another kind, is refused."""
    ema = few()
    change(ema)
    with pytest.raises(ModelError):
        nothing_runs(snapshot(tmp_path, ema))
    refusal(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("thing", [None, [], 3, {}, {"ema": None}, {"ema": {}}, {"net": few()}, {"ema": torch.ones(3)}])
def test_pickles_of_something_else(tmp_path, thing):
    """A pickle of anything but a snapshot is refused."""
    assert "ema" in refusal(write(tmp_path / "other.pkl", thing))


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(100), b"<!DOCTYPE html>", b"version https://git-lfs", b"\x89PNG\r\n"])
def test_files_of_something_else(tmp_path, content):
    """A file that is no pickle is refused as such: an archive, an error page, a pointer to a large file."""
    (tmp_path / "other.pkl").write_bytes(content)
    assert all("not a pickle" in refusal(tmp_path / "other.pkl", read) for read in (read_nvlabs, hub.description, load_denoiser))


@pytest.mark.parametrize("read", [read_nvlabs, load_nvlabs, load_denoiser, hub.description])
def test_no_file(tmp_path, read):
    """A path where there is nothing, or a folder, is refused."""
    (tmp_path / "folder.pkl").mkdir()
    assert all(f"{name}.pkl" in refusal(tmp_path / f"{name}.pkl", read) for name in ("nothing", "folder"))


def test_truncated(tmp_path, nothing_runs):
    """A file that was cut off, at any of its bytes, is refused as such; so is one with something after its end."""
    file = tmp_path / "snapshot.pkl"
    whole = file.read_bytes()
    for length in (*range(1, 100), *random.Random(0).sample(range(1, len(whole)), 300), *range(len(whole) - 50, len(whole))):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=": truncated$"):
            nothing_runs(file)
    file.write_bytes(whole + b"\x80\x04N.")
    assert "follows" in refusal(file)


# --- the network of a file

@pytest.mark.parametrize("changes, said", [
    ({"num_blocks": 10**6}, "too few"), ({"label_dim": 2**31 - 1}, "size mismatch"), ({"depth": 3}, "depth"),
    ({"model_channels": 2**30}, ""), ({"channels_per_head": 0}, ""), ({"num_blocks": "many"}, ""), ({"channel_mult": None}, ""),
    ({"model_channels": -8}, ""), ({"img_resolution": float("inf")}, ""), ({"num_blocks": -(10**9)}, ""),
], ids=repr)
def test_arguments_of_another_network(tmp_path, changes, said):
    """Arguments that do not belong to the tensors are refused before any memory is taken for the network that they describe."""
    path = snapshot(tmp_path, modules(public_state(), CONFIG | changes, "Precond"))
    read_nvlabs(path)
    assert all(said in refusal(path, read) for read in (load_nvlabs, load_denoiser, hub.description))


@pytest.mark.parametrize("value", [
    {}, {"a": 1}, [[1]], [1] * 65, 2**31, -(2**600), b"8", modules(FEW), torch.ones(2), np.float32(3), OrderedDict,
], ids=range(11))
def test_arguments_are_plain(tmp_path, nothing_runs, value):
    """An argument that is not a number, a string or a short list of them is refused by its name; so is one whose name is none."""
    with pytest.raises(ModelError, match="'dropout'"):
        nothing_runs(snapshot(tmp_path, few(CONFIG | {"dropout": value})))
    refusal(snapshot(tmp_path, few(CONFIG | {"\x1b[31m\n": 1})))


@pytest.mark.parametrize("damage", [
    lambda state: state.pop("unet.out_gain"), lambda state: state.update({"unet.out_gain": torch.ones(2).half()}),
    lambda state: state.update({"unet.out_gains": torch.ones(1).half()}),
], ids=["missing", "shape", "extra"])
def test_tensors_of_another_network(tmp_path, damage):
    """A tensor that is missing, left over or of another shape is refused by its name."""
    state = public_state()
    damage(state)
    path = snapshot(tmp_path, modules(state, CONFIG, "Precond"))
    assert "out_gain" in refusal(path, load_nvlabs) and "out_gain" in refusal(path, hub.description)


# --- tensors that are none

def storage_bytes(values=6, dtype=torch.float16):
    file = io.BytesIO()
    torch.save(torch.arange(values).to(dtype)._typed_storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def view(offset, size, stride, blob=None):
    blob = storage_bytes() if blob is None else blob
    storage = Call(torch.storage._load_from_bytes, blob)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


@pytest.mark.parametrize("offset, size, stride, expected", [
    (0, (2, 3), (3, 1), [[0, 1, 2], [3, 4, 5]]), (0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),
    (4, (2,), (1,), [4, 5]), (5, (), (), 5),
    (1, (2, 2), (2, 2), [[1, 3], [3, 5]]), (2, (1, 3), (2**62, 0), [[2, 2, 2]]),
])
def test_views_within_a_storage(tmp_path, nothing_runs, offset, size, stride, expected):
    """Any view that lies within its storage, and has no more elements, is read."""
    assert nothing_runs(holding(tmp_path, view(offset, size, stride)))[1]["w"].tolist() == expected


@pytest.mark.parametrize("offset, size, stride", [
    (0, (7,), (1,)), (1, (6,), (1,)), (6, (), ()), (2**62, (1,), (1,)), (0, (2, 2), (5, 1)), (0, (2,), (2**40,)),
    (0, (2,), (2**63,)), (0, (3, 3), (0, 0)), (0, (2**62, 2**62), (0, 0)), (0, (2**40,), (0,)), (-1, (1,), (1,)),
    (0, (2,), (-1,)), (3, (2,), (-1,)), (0, (-2,), (1,)), (0, (-2, -3), (3, 1)), (0, (0,), (1,)), (0, (0, 2**62), (1, 1)),
    (0, (2,), (1, 1)), (0, (2, 3), (3,)), (0, (1,) * 9, (1,) * 9), (0, [2], [1]), (0, (2.0,), (1,)), (0, 2, 1),
    (None, (2,), (1,)), (True, (2,), (1,)), (0, (True,), (1,)), (0, ((2,),), (1,)), (0, b"\2", b"\1"),
    (10**600, (1,), (1,)), (0, (10**600,), (1,)),
])
def test_views_outside_a_storage(tmp_path, nothing_runs, offset, size, stride):
    """A tensor that reaches outside its storage, repeats it into more elements or has no proper size is refused by its name."""
    with pytest.raises(ModelError, match="w: "):
        nothing_runs(holding(tmp_path, view(offset, size, stride)))
    refusal(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("damage", [
    lambda blob: b"", lambda blob: blob[:-1], lambda blob: blob + b"\0", lambda blob: blob[:-14], lambda blob: blob[:50],
    lambda blob: blob.replace(b"K\6Nt", b"K\7Nt"), lambda blob: blob.replace(struct.pack("<q", 6), struct.pack("<q", 2**40)),
    lambda blob: blob.replace(b"K\6Nt", b"J\0\0\0\x7fNt").replace(struct.pack("<q", 6), struct.pack("<q", 0x7F000000)),
    lambda blob: blob.replace(b"K\6Nt", b"J\xff\xff\xff\xffNt"), lambda blob: blob.replace(b"HalfStorage", b"FloatStorage"),
    lambda blob: blob.replace(b"endianq\x02\x88", b"endianq\x02\x89"), lambda blob: blob.replace(b"M\xe9\x03.", b"M\xea\x03."),
    lambda blob: blob.replace(b"\7\0\0\0storage", b"\6\0\0\0module"), lambda blob: blob.replace(b"HalfStorage", b"IntStorage"),
    lambda blob: blob.replace(b"ctorch\nHalfStorage", b"cposix\nsystem"),
    lambda blob: blob.replace(b"ctorch\nHalfStorage", b"ctorch\nload"),
], ids=range(16))
def test_damaged_storages(tmp_path, nothing_runs, damage):
    """A storage that is cut off, lies about its length, is of an unknown type or of another format is refused."""
    blob = damage(storage_bytes())
    assert blob != storage_bytes()
    with pytest.raises(ModelError):
        nothing_runs(holding(tmp_path, view(0, (6,), (1,), blob)))
    refusal(tmp_path / "snapshot.pkl")


def test_one_storage_for_many_tensors(tmp_path, nothing_runs):
    """Tensors that share the file's bytes would be larger than the file: refused before they take memory."""
    shared = view(0, (100_000,), (1,), storage_bytes(100_000))
    ema = few()
    ema.meta["state"]["_parameters"] = {f"w{i}": shared for i in range(10_000)}
    with pytest.raises(ModelError, match="larger than the file"):
        nothing_runs(snapshot(tmp_path, ema))


# --- files that want something run

HOSTILE = """os.system posix.system nt.system subprocess.Popen builtins.eval builtins.exec builtins.getattr builtins.__import__
    importlib.import_module pickle.loads torch.load torch.storage.UntypedStorage torch.serialization.load torch.jit.load
    torch.hub.load torch._utils._rebuild_tensor_v3 torch.nn.modules.container.Sequential numpy.load functools.partial
    numpy.core.multiarray.fromfile collections.namedtuple operator.attrgetter _codecs.encode copyreg._reconstructor
    types.FunctionType models.snapshots._Stub""".split()
DOTTED = [
    ("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"), ("torch.storage", "_load_from_bytes.__globals__"),
    ("collections", "OrderedDict.__init__"), ("collections", "abc.sys"), ("collections.OrderedDict", "__class__"),
    ("torch", "_utils._rebuild_parameter"), ("dnnlib.util", "EasyDict.update"), ("numpy", "ndarray "),
]


def text(string):
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


TOUCH = text("touch ran")


def named(module, name, protocol=4):
    return text(module) + text(name) + b"\x93" if protocol > 3 else f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize("protocol", [2, 4])
def test_unknown_names_are_refused(tmp_path, nothing_runs, protocol):
    """A name that is not one of a snapshot's is refused by itself, in all ways of calling it, and wherever it stands."""
    pairs = [tuple(name.rsplit(".", 1)) for name in HOSTILE] + DOTTED
    for module, name in pairs:
        for call in (b"", TOUCH + b"\x85R", b")R", TOUCH + b"\x85\x81", TOUCH + b"b"):
            (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + named(module, name, protocol) + call + b".")
            with pytest.raises(ModelError) as refused:
                nothing_runs(tmp_path / "snapshot.pkl")
            assert f"{module}.{name}" in str(refused.value) and "refused" in str(refused.value)


def test_names_cannot_break_the_message(tmp_path):
    """A name with line breaks, control characters or no end leaves the message a short line."""
    for name in ("a\nb\r\x1b[31m\u2028\u202e", "a" * 10**6, "\ud800"):
        blob = name.encode("utf-8", "surrogatepass")
        (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04X\1\0\0\0oX" + struct.pack("<I", len(blob)) + blob + b"\x93.")
        assert refusal(tmp_path / "snapshot.pkl").isprintable()


@pytest.mark.parametrize("opcodes", [
    b"(" + TOUCH + b"iposix\nsystem\n", b"(cposix\nsystem\n" + TOUCH + b"o", b"cposix\nsystem\n" + TOUCH + b"\x85}\x92",
    b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0", b"P1\n", b"NQ", b"\x97", b"\x97\x98", b"I1\n", b"L1L\n", b"F1\n", b"S'a'\n", b"V1\n",
    b"U\1a", b"T\1\0\0\0a", b"N2", b"N0N", b"(1N", b"Np0\n", b"Np0\n0g0\n", b"\x8f(K\1\x90", b"(K\1\x91",
    b"\x8b\1\0\0\0\0", b"(lN", b"(dN",
], ids=repr)
def test_other_opcodes_are_refused(tmp_path, nothing_runs, opcodes):
    """Opcodes that no snapshot is written with are refused: other calls, the extension registry, persistent identities, text."""
    copyreg.add_extension("posix", "system", 1)
    try:
        assert pickle.loads(b"\x80\x02\x82\x01.")  # from here on, no unpickler looks it up
        (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + opcodes + b".")
        with pytest.raises(ModelError, match="no place"):
            nothing_runs(tmp_path / "snapshot.pkl")
    finally:
        copyreg.remove_extension("posix", "system", 1)


def own_classes():
    classes = [thing for thing in vars(snapshots).values() if isinstance(thing, type) and thing.__module__ == "models.snapshots"]
    return {thing: dict(vars(thing)) for thing in classes}


STUBS = [named(module, name) for module, name in snapshots.GLOBALS]


@pytest.mark.parametrize("stub", STUBS, ids=range(len(STUBS)))
def test_stubs_are_inert(tmp_path, nothing_runs, stub):
    """What a file does to a stub, its class or what it makes changes nothing outside that file: no state, attribute or item."""
    before = own_classes()
    state = b"}" + text("__new__") + named("collections", "OrderedDict") + b"s" + text("__setstate__") + b"Ns"
    deeds = [state + b"b", b"N" + state + b"\x86b", b"Nb", b"(b", text("a") + b"Ns", b"K\0Ns", b"Na", b"(NNe", b")R", b")\x81"]
    for made in (b"", b")R", b")\x81", b"N\x85R", b"N\x85\x81", b")R)R", b"]\x85R", b"})\x81", b"N\x85RN\x85R"):
        for done in deeds:
            (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + stub + made + done + b".")
            with pytest.raises(ModelError):
                nothing_runs(tmp_path / "snapshot.pkl")
    assert before == own_classes()
    assert same(nothing_runs(snapshot(tmp_path))[1], FEW)


class Bomb:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return eval, ("__import__('os').system('touch ran')",)


def legacy(thing, zipped=False):
    file = io.BytesIO()
    torch.save(thing, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def part_of(blob):
    return view(0, (1,), (1,), blob)


@pytest.mark.parametrize("hide", [
    lambda: Bomb(), lambda: [Bomb()], lambda: Persistent("MPConv", Bomb()), lambda: Persistent("MPConv", {"_parameters": Bomb()}),
    lambda: Persistent("MPConv", {"__setstate__": Bomb()}), lambda: Persistent(Bomb(), {}),
    lambda: Persistent("A", {}, source=Bomb()), lambda: part_of(pickle.dumps(Bomb())), lambda: part_of(legacy(Bomb())),
    lambda: part_of(legacy(Bomb())[:33] + pickle.dumps(Bomb())),
    lambda: part_of(legacy({"w": Bomb()}, zipped=True)), lambda: part_of(legacy({"w": torch.ones(3)}, zipped=True)),
    lambda: view(0, (Bomb(),), (1,)), lambda: view(Bomb(), (1,), (1,)), lambda: Call(_reconstruct_persistent_obj, Bomb()),
    lambda: Call(torch._utils._rebuild_parameter, Bomb(), False, {}),
    lambda: Call(torch._utils._rebuild_parameter, 3, state=Bomb()),
    lambda: Call(torch.storage._load_from_bytes, pickle.dumps(Bomb())),
    lambda: Call(torch._utils._rebuild_tensor_v2, Bomb(), 0, (), ()),
], ids=range(19))
@pytest.mark.parametrize("where", PARTS)
def test_hidden_calls(tmp_path, nothing_runs, hide, where):
    """A call that is hidden in a tensor, a storage, a module or an argument is refused and never made."""
    ema = few()
    if where == "_init_args":
        ema.meta["state"][where] = (hide(),)
    else:
        ema.meta["state"][where]["w"] = hide()
    with pytest.raises(ModelError):
        nothing_runs(snapshot(tmp_path, ema))
    with pytest.raises(ModelError):
        load_denoiser(snapshot(tmp_path, ema))


@pytest.mark.parametrize("name", ["Precond", "EDMPrecond", "VPPrecond"])
def test_embedded_source_is_not_run(tmp_path, nothing_runs, name):
    """The source code that a snapshot brings along is neither compiled nor executed, at any depth."""
    ema = few(name=name)
    ema.meta["module_src"] = ema.meta["state"]["_modules"]["enc"]._modules["block"].meta["module_src"] = "open('ran', 'w')"
    if name != "VPPrecond":
        assert same(nothing_runs(snapshot(tmp_path, ema))[1], FEW)
    else:
        assert name in refusal(snapshot(tmp_path, ema))


# --- files that want time or memory

def nested(shape, levels=60):
    """Each level holds the one below it twice: whoever follows all references meets 2^levels of them."""
    value = None
    for _ in range(levels):
        value = shape(value)
    return value


SHAPES = {"tuple": lambda x: (x, x), "list": lambda x: [x, x], "dict": lambda x: {"a": x, "b": x},
          "stub": lambda x: view(0, x, x)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_growth_by_references(tmp_path, nothing_runs, shape):
    """What grows exponentially when it is followed is refused wherever it is looked at, and does no harm where it is not."""
    bomb = nested(shape)
    assert same(nothing_runs(snapshot(tmp_path, encoder=bomb))[1], FEW)
    for place in PARTS:
        for whole in (False, True):
            ema = few()
            ema.meta["state"][place] = bomb if whole or place == "_init_args" else {"w": bomb}
            with pytest.raises(ModelError):
                nothing_runs(snapshot(tmp_path, ema))
    parameter = Call(torch._utils._rebuild_parameter, bomb, bomb, bomb)
    for value in (view(bomb, (1,), (1,)), view(0, bomb, bomb), view(0, (bomb,), (1,)), parameter):
        with pytest.raises(ModelError):
            nothing_runs(holding(tmp_path, value))
    for key in ("version", "class_name", "state"):
        ema = few()
        ema.meta[key] = bomb
        with pytest.raises(ModelError):
            nothing_runs(snapshot(tmp_path, ema))


@pytest.mark.parametrize("key", [nested(SHAPES["tuple"]), 3, 2**61 - 1, None, 1.5, b"a", (), OrderedDict], ids=range(8))
def test_keys_are_strings(tmp_path, nothing_runs, key):
    """A dict with a key that is no string is refused before the key is hashed: nested tuples would take 2^60 steps."""
    blob = pickle.dumps(key, 4)[2:-1]
    blob = blob[9:] if blob[:1] == b"\x95" else blob
    good = text("a") + b"N"
    for entry in (b"}" + blob + b"Ns", b"}(" + blob + b"Nu", b"}(" + good + blob + b"Nu", b"}(" + blob + b"N" + good + b"u"):
        (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + entry + b".")
        with pytest.raises(ModelError, match="no string"):
            nothing_runs(tmp_path / "snapshot.pkl")


def crowd(levels, width):
    """Modules within modules, all those of a level one and the same."""
    inner = modules({})
    for _ in range(levels):
        outer = modules({})
        outer.meta["state"]["_modules"] = {f"m{i}": inner for i in range(width)} | {f"none{i}": None for i in range(width)}
        inner = outer
    return inner


def endless():
    """A module that contains itself."""
    module = nn.ModuleDict()
    module._modules["a" * 64] = module
    return module


@pytest.mark.parametrize("module", [crowd(60, 2), crowd(9, 30), crowd(3, 300), endless()], ids=["deep", "many", "wide", "round"])
def test_modules_without_end(tmp_path, nothing_runs, module):
    """Modules that are reached by a great many names, or by endless ones, are refused."""
    ema = few()
    ema.meta["state"]["_modules"]["unet"] = module
    with pytest.raises(ModelError):
        nothing_runs(snapshot(tmp_path, ema))


LENGTHS = {"B": [255], "I": [10**8, 2**31 - 1, 2**32 - 1], "Q": [10**10, 2**62, 2**64 - 1]}
CLAIMS = [opcode + struct.pack(f"<{kind}", length) for kind, opcodes in {
    "B": (b"C", b"\x8c", b"\x8a", b"h", b"Nq"), "I": (b"B", b"X", b"j", b"Nr"), "Q": (b"\x8e", b"\x8d", b"\x96", b"\x95"),
}.items() for opcode in opcodes for length in LENGTHS[kind]]


def test_claims_reserve_no_memory(tmp_path, nothing_runs):
    """A length or an index that the file does not have takes no memory before it is refused, in a snapshot and in a storage."""
    tracemalloc.start()
    try:
        for claim in CLAIMS:
            (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + claim + b"}.")
            refusal(tmp_path / "snapshot.pkl")
            refusal(holding(tmp_path, view(0, (1,), (1,), b"\x80\x02" + claim + b".")))
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opcodes", [b"\x8f", b"(", b"N\x94", b"]("], ids=["sets", "marks", "memo", "lists"])
def test_crowds_of_opcodes(tmp_path, nothing_runs, opcodes):
    """More opcodes than any snapshot has, each of which may take more memory than its byte, are refused."""
    (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + opcodes * 10**6 + b".")
    with pytest.raises(ModelError, match="more than .* opcodes"):
        nothing_runs(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("opcodes", [
    b"", b"(", b"(N", b"N(", b"Ns", b"a", b"(a", b"(Na", b"]N(Na", b"N(e", b"u", b"(u", b"}(u", b"\x85", b"(\x85", b"N(\x86",
    b"t", b"R", b"NR", b"b", b"(b", b"\x94", b"(\x94", b"q\0", b"(q\0", b"\x93", b"NNNN",
], ids=repr)
def test_broken_stacks(tmp_path, nothing_runs, opcodes):
    """Opcodes that find the stack empty, or a mark where they need an object, are refused."""
    (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + opcodes + b".")
    with pytest.raises(ModelError):
        nothing_runs(tmp_path / "snapshot.pkl")
    refusal(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("inside, after", [
    (b"J\0\0", b"\0\0"), (b"X\2\0\0\0a", b"a"), (b"cnumpy", b"\ndtype\n"), (b"\x95" + struct.pack("<Q", 1), b"N"),
    (b"B\4\0\0\0", b"four"),
], ids=repr)
def test_frames_cannot_smuggle(tmp_path, nothing_runs, inside, after):
    """An opcode that crosses the end of its frame is refused: the unpickler would go on elsewhere than the survey did."""
    (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04\x95" + struct.pack("<Q", len(inside)) + inside + after + b".")
    with pytest.raises(ModelError, match="is broken$"):
        nothing_runs(tmp_path / "snapshot.pkl")


def test_deep_stubs_are_freed(tmp_path, nothing_runs):
    """Sixty thousand stubs within each other are refused, and are freed again without a deep recursion."""
    stub = named("numpy", "dtype")
    (tmp_path / "snapshot.pkl").write_bytes(b"\x80\x04" + stub + b"\x94" + b"h\0" * 60_000 + b"N" + b"\x85R" * 60_000 + b".")
    with pytest.raises(ModelError, match="has no ema"):
        nothing_runs(tmp_path / "snapshot.pkl")


def mutations(blob, rng, count):
    """Damaged copies: bytes replaced, or whole opcodes dropped, doubled, exchanged or replaced."""
    starts = [at for _, _, at in pickletools.genops(blob)] + [len(blob)]
    opcodes = [blob[a:b] for a, b in zip(starts, starts[1:])]
    small = [bytes([code]) for code in b"()]}.NRbatuseQ\x81\x85\x86\x87\x93\x94\x8f"]
    for number in range(count):
        pieces = [bytes([code]) for code in blob] if number % 2 else list(opcodes)
        for _ in range(rng.choice((1, 1, 3, 10))):
            i, j = rng.randrange(2, len(pieces)), rng.randrange(2, len(pieces))
            pieces[i] = rng.randbytes(1) if number % 2 else rng.choice((b"", pieces[i] * 2, pieces[j], rng.choice(small)))
        yield b"".join(pieces)


def test_fuzzing(tmp_path, nothing_runs):
    """Damaged snapshots are read or refused: nothing else is raised, nothing is run, and little memory is taken."""
    blob = (tmp_path / "snapshot.pkl").read_bytes()
    blob = blob[:2] + blob[11:]  # without its frame, whose length would give away what is dropped or doubled
    refused = 0
    tracemalloc.start()
    try:
        for damaged in mutations(blob, random.Random(0), 600):
            (tmp_path / "snapshot.pkl").write_bytes(damaged)
            try:
                nothing_runs(tmp_path / "snapshot.pkl")
            except ModelError as error:
                refused += 1
                assert str(error).isprintable()
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert 300 < refused < 600
