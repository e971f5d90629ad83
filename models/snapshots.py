"""NVlabs' EDM and EDM2 network snapshots (`.pkl`), read without running anything that is in them.

A snapshot pickles its networks with the source code of their classes, which the official loader executes. Here nothing of
a file is imported, compiled or called:

* `_survey` reads the opcodes before anything obeys them, and lets through those that snapshots are written with, within
  bounds that keep time and memory in proportion to the file;
* `_Strict`, a `pickle.Unpickler`, gives inert stubs for a dozen names and refuses all others: nothing else can be called;
* what then lies there, stubs and plain data, is walked with every type, name, size and stride checked.

The format: {"ema": network, ...}. A network's module is a call of `_reconstruct_persistent_obj` on a dict of its class's
name, its source and its `__dict__`; the storage of each tensor is a file of its own, in torch's old format, as bytes.
"""

import math
import pickle
import pickletools
import re
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.edm2_unet import from_nvlabs
from models.edm_unet import from_edm
from models.hub import ModelError, describe

MAX_OPCODES = 200_000  # EDM2's networks take 32 thousand at any width, EDM's up to 63: they grow with the layers
MAX_STORAGE_OPCODES = 100  # of each pickle in a storage; torch writes 4 to 27
MAX_DEPTH = 10  # modules within modules; the network has 4
MAX_ITEMS = 64  # in a list among the constructor's arguments
NETWORKS = {"EDMPrecond": from_edm, "Precond": from_nvlabs}  # by their classes' names
STEPS = {"EDMPrecond": 18, "Precond": 32}  # of Heun's method
LISTS = ("channel_mult", "attn_resolutions", "resample_filter")  # arguments that are one
WORDS = ("model_type", "embedding_type", "encoder_type", "decoder_type")  # arguments that are text
NAME = re.compile(r"\w{1,64}", re.ASCII)

DATA = set("""PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL""".split())
STORAGE_OPCODES = DATA | {"BINPERSID"}
SNAPSHOT_OPCODES = DATA | set("""FRAME MEMOIZE STACK_GLOBAL SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    BYTEARRAY8 EMPTY_SET NEWOBJ REDUCE BUILD""".split())


class _Stub:
    """What stands in the place of a class or function of the file. It keeps what it is given, and does nothing with it.

    A class, for NEWOBJ takes nothing else. Without a `__setstate__`, BUILD would set any attribute, of the class as well.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args):
        stub = object.__new__(cls)
        stub.args, stub.state = args, None
        return stub

    def __setstate__(self, state):
        self.state = state


# Their args: ({"class_name", "module_src", "state": the `__dict__`, ...},); none, but the `__dict__` of a ModuleDict in state;
# (tensor, requires_grad, hooks); (storage, offset, size, stride, ...); (bytes,). _Array: numpy's, in an encoder.
_Network, _Modules, _Parameter, _View, _Storage, _Array = (type(name, (_Stub,), {"__slots__": ()}) for name in (
    "Network", "Modules", "Parameter", "View", "Storage", "Array"))


class _Dict(_Stub):
    """Any kind of dict, as a plain and empty one."""

    def __new__(cls):
        return {}


GLOBALS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Network,
    ("torch.nn.modules.container", "ModuleDict"): _Modules,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _View,
    ("torch.storage", "_load_from_bytes"): _Storage,  # torch's own is an unrestricted torch.load
    ("dnnlib.util", "EasyDict"): _Dict, ("collections", "OrderedDict"): _Dict,
    ("numpy", "dtype"): _Array, ("numpy", "ndarray"): _Array, ("numpy._core.numeric", "_frombuffer"): _Array,
    **{(f"numpy.{core}.multiarray", name): _Array for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
}
STORAGE_GLOBALS = {("torch", "HalfStorage"): torch.float16, ("torch", "FloatStorage"): torch.float32}


class _Strict(pickle.Unpickler):
    """An unpickler to which no name means anything but those of `known`."""

    known: dict

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise ModelError(f"it asks for {f'{module}.{name}'[:80]!r}, which no snapshot of EDM or EDM2 needs: refused")
        return self.known[module, name]

    def persistent_load(self, pid):
        return pid


def _line(said) -> str:
    """One line of a message, into which text of the file may have come."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(said)[:300]).split())


def _load(file: BytesIO, opcodes: set[str], limit: int, known: dict):
    """The object that is pickled here, made of stubs and plain data. Leaves the file behind its last byte."""
    start = file.tell()
    _survey(file, opcodes, limit)
    file.seek(start)
    unpickler = _Strict(file)
    unpickler.known = known
    return unpickler.load()


def _survey(file: BytesIO, opcodes: set[str], limit: int) -> None:
    """Read the opcodes from here to STOP without obeying them, and refuse what the unpickler should not meet.

    That is any opcode but these, or more than the limit; a length beyond the end of the file; a memo index but the next;
    a dict key that is no string: the hash of nested tuples, or of integers chosen to collide, can take for ever.
    """
    stack, marks, memo, frame, steps = [], [], [], 0, pickletools.genops(file)
    for _ in range(limit):
        try:
            op, arg, at = next(steps)
        except StopIteration:
            return
        except ValueError as error:
            raise ModelError(f"not a pickle ({error})" if file.read(1) else "truncated") from None
        if op.name not in opcodes:
            raise ModelError(f"opcode {op.name} at byte {at} has no place in a snapshot: refused")
        # Where an opcode crosses the end of its frame, the unpickler drops the frame's rest, and reads other opcodes than these.
        if at < frame and (op.name == "FRAME" or file.tell() > frame):
            raise ModelError(f"the frame around byte {at} is broken")
        frame = file.tell() + arg if op.name == "FRAME" else frame
        _step(op, arg, stack, marks, memo)
    raise ModelError(f"more than {limit} opcodes, and no snapshot needs so many: refused")


def _step(op, arg, stack: list[bool], marks: list[int], memo: list[bool]) -> None:
    """What an opcode does to the unpickler's stack and memo. Of each object is kept whether it is a string."""
    if op.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
        index = len(memo) if arg is None else arg
        if index > len(memo):
            raise ModelError(f"memo index {index} after {len(memo)} objects: refused")
        memo[index:index + 1] = stack[-1:]
    elif op.name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[arg])
    elif op.name == "MARK":
        marks.append(len(stack))
    else:
        below = [kind for kind in op.stack_before if kind not in (pickletools.markobject, pickletools.stackslice)]
        start = (marks.pop() if len(below) < len(op.stack_before) else len(stack)) - len(below)
        if start < (marks[-1] if marks else 0):
            raise ModelError("not a pickle (an opcode finds its stack empty)")
        if op.name in ("SETITEM", "SETITEMS") and not all(stack[start + 1::2]):
            raise ModelError("a dict has a key that is no string: refused")
        stack[start:] = [kind is pickletools.pyunicode for kind in op.stack_after]


def _storage(name: str, blob: bytes) -> tuple[torch.dtype, int, memoryview]:
    """A storage in torch's old format -> its type, number of elements and bytes."""
    file = BytesIO(blob)
    parts = [_load(file, STORAGE_OPCODES, MAX_STORAGE_OPCODES, STORAGE_GLOBALS) for _ in range(5)]
    magic, version, system, (kind, dtype, _, _, count, *views), _ = parts
    length, data = file.read(8), memoryview(blob)[file.tell():]
    whole = length == count.to_bytes(8, "little") and len(data) == count * dtype.itemsize and system["little_endian"] is True
    if not whole or (magic, version, kind, views) != (0x1950A86A20F9469CFC6C, 1001, "storage", [None]):
        raise ModelError(f"{name}: its storage is not in torch's format, or not whole")
    return dtype, count, data


def _tensor(name: str, blob: bytes, offset: int, size: tuple, stride: tuple) -> Tensor:
    """A contiguous tensor of its own. It has no more elements than its storage, and none from outside it."""
    dtype, count, data = _storage(name, blob)
    if not (type(size) is type(stride) is tuple and len(size) == len(stride) <= 8) or 0 in size:
        raise ModelError(f"{name}: its size and stride are not a tensor's")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ModelError(f"{name}: its size, stride or offset is negative, or not an integer")
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride))
    if offset + span > count or math.prod(size) > count:
        raise ModelError(f"{name}: size {size}, stride {stride} and offset {offset} reach outside its {count} elements")
    flat = torch.frombuffer(bytearray(data[offset * dtype.itemsize:(offset + span) * dtype.itemsize]), dtype=dtype)
    return flat.as_strided(size, stride).contiguous()


def _layout(name: str, value) -> tuple:
    """The stub of a tensor or a parameter -> what `_tensor` takes, of which only the bytes are checked."""
    value = value.args[0] if type(value) is _Parameter else value
    if type(value) is not _View or type(value.args[0]) is not _Storage or type(value.args[0].args[0]) is not bytes:
        raise ModelError(f"{name} is not a tensor")
    return value.args[0].args[0], *value.args[1:4]


def _part(holder, key: str, kind: type):
    """holder[key], of a dict that has it and has it of that type."""
    if type(holder) is not dict or type(holder.get(key)) is not kind:
        raise ModelError(f"it has no {key}, or none of the kind that it should be")
    return holder[key]


def _meta(module) -> dict:
    """What `_reconstruct_persistent_obj` was given for a module."""
    if type(module) is not _Network or type(module.args[0]) is not dict:
        raise ModelError("what should be a module of it is none")
    return module.args[0]


def _entries(module, prefix: str):
    """Yields what is registered in a module: its full name, whether it is a module, and its stub."""
    state = module.state if type(module) is _Modules else _part(_meta(module), "state", dict)
    for part in ("_parameters", "_buffers", "_modules"):
        for name, value in _part(state, part, dict).items():
            if not NAME.fullmatch(name) or prefix.count(".") > MAX_DEPTH:
                raise ModelError(f"{name[:80]!r} is no name of a module or a tensor, or lies too deep")
            yield prefix + name, part == "_modules", value


def _state_dict(network, size: int) -> dict[str, Tensor]:
    """Tensors by their public names. size: the file's. Each tensor has bytes of its own there, so all together have no more."""
    found, waiting, steps = {}, [("", network)], 0
    while waiting:
        prefix, module = waiting.pop()
        for name, inner, value in _entries(module, prefix):
            steps += 1
            if steps > MAX_OPCODES:  # one module under many names is walked once for each
                raise ModelError("more names than any network has: refused")
            if inner and value is not None:
                waiting.append((f"{name}.", value))
            elif value is not None:
                blob, *layout = _layout(name, value)
                size -= len(blob)
                if size < 0:
                    raise ModelError("the tensors are larger than the file: refused")
                found[name] = _tensor(name, blob, *layout)
    return found


def _arguments(state: dict) -> dict:
    """The constructor's arguments: numbers, strings, and short lists of them."""
    if len(_part(state, "_init_args", tuple)):
        raise ModelError("its constructor was given arguments without names, which are not understood")
    arguments = _part(state, "_init_kwargs", dict)
    for name, value in arguments.items():
        values = value if type(value) in (list, tuple) else [value]
        plain = all(v is None or type(v) in (bool, float, str) or type(v) is int and abs(v) < 2**31 for v in values)
        if not plain or len(values) > MAX_ITEMS or not NAME.fullmatch(name):
            raise ModelError(f"constructor argument {name[:80]!r} is neither a number nor a string nor a short list of them")
    return {name: list(value) if type(value) is tuple else value for name, value in arguments.items()}


def _read(data: bytes) -> tuple[str, dict, dict[str, Tensor]]:
    if not data.startswith(b"\x80"):
        raise ModelError("not a pickle (of protocol 2 or later)")
    file = BytesIO(data)
    snapshot = _load(file, SNAPSHOT_OPCODES, MAX_OPCODES, GLOBALS)
    if file.tell() != len(data):
        raise ModelError("something follows the pickle's end")
    network = _part(snapshot, "ema", _Network)
    name = _part(_meta(network), "class_name", str)
    if name not in NETWORKS or _meta(network).get("version") != 6:
        known = "EDM's 'EDMPrecond' and EDM2's 'Precond' (of persistence version 6) are"
        raise ModelError(f"its network is a {name[:80]!r}, and only {known} known here")
    return name, _arguments(_part(_meta(network), "state", dict)), _state_dict(network, len(data))


def _read_file(path: str) -> tuple[str, dict, dict[str, Tensor]]:
    """The class of a snapshot's `ema` network, the class's arguments and its tensors, of the file's type, by their public names.

    Raises ModelError, whose message is one line: the file, and what is wrong with it.
    """
    try:
        return _read(Path(path).read_bytes())
    except Exception as error:  # what makes no sense as a snapshot raises nearly anything, wherever it stops doing so
        said = error if isinstance(error, ModelError) else f"it cannot be read ({type(error).__name__}: {error})"
        raise ModelError(f"{path}: {_line(said)}") from None


def read_nvlabs(path: str) -> tuple[dict, dict[str, Tensor]]:
    """A snapshot's `ema` network: its class's arguments and its tensors. Raises ModelError, as `_read_file` does."""
    return _read_file(path)[1:]


def _check_kinds(config: dict) -> None:
    """Only numbers are multiplied into sizes: a list or a string, repeated, would take memory."""
    for name, value in config.items():
        for v in value if name in LISTS and type(value) is list else [value]:
            if not (v is None or type(v) in (bool, int, float) or name in WORDS and type(v) is str):
                raise ValueError(f"{name} is of a kind that it cannot be")


def _describe(path: str, name: str, config: dict, state: dict[str, Tensor]) -> dict:
    """Builds the network on the meta device, where sizes that the file only claims take no memory."""
    try:
        _check_kinds(config)
        blocks = config.get("num_blocks", 3) * len(config.get("channel_mult", (1, 2, 3, 4)))
        if 4 * blocks > len(state):
            raise ValueError(f"{len(state)} tensors are too few for {blocks} blocks")
        with torch.device("meta"):
            denoiser = NETWORKS[name](config, {key: value.to("meta") for key, value in state.items()})
        known = {"unconditional": config.get("label_dropout", 0) > 0} if name == "EDMPrecond" else {}  # of EDM2's, nothing is said
    except Exception as error:  # the arguments are the file's: of any type and value
        raise ModelError(f"{path}: no network can be built from it: {_line(error)}") from None
    return {**describe(denoiser), "sampler": {"type": "heun", "steps": STEPS[name]}, **known}


def description(path: str) -> dict:
    """What `hub.description` says of a model, of a snapshot. The file is read, but no network is built."""
    return _describe(path, *_read_file(path))


def load_nvlabs(path: str) -> tuple[Denoiser, dict]:
    """A frozen denoiser in float32, in eval mode, and its description. Raises ModelError, as `read_nvlabs` does."""
    name, config, state = _read_file(path)
    found = _describe(path, name, config, state)
    return NETWORKS[name](config, state), found
