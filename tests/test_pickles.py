"""Tests: public pickles become safetensors bit for bit, and nothing in them runs."""

import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import equal_weights
from safetensors.torch import load_file
from torch import nn

from support.convert import Unpickler, convert
from support.files import BadInput
from weights import load_control, main, save_control

LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = {"zip": {}, "legacy": LEGACY, "legacy, protocol 5": LEGACY | {"pickle_protocol": 5}}
each_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def converted(content: object, folder: Path, **options) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Writes a file with torch.save and converts it -> the tensors, and what was left out."""
    torch.save(content, folder / "in.ckpt", **options)
    _, left_out = convert(folder / "in.ckpt", folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), left_out


def archive(pickled: bytes, compression=zipfile.ZIP_STORED, members: tuple[str, ...] = ("version",)) -> bytes:
    """A zip as torch.save writes it, around a given pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for member in members:
            file.writestr(f"archive/{member}", b"3\n")
    return content.getvalue()


def legacy(pickled: bytes) -> bytes:
    """A file as torch.save wrote it before version 1.6, around a given pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    before = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    return before + pickled + pickle.dumps([], 2)


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in ours.items())


class Calls:
    """An object that is pickled as a function call, as any class may request."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------- checkpoints


@each_format
def test_every_kind_of_tensor_comes_through_bit_for_bit(tmp_path, options):
    x = torch.arange(24.0).reshape(4, 6) - 0.7
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    tensors = OrderedDict({dtype: x.to(getattr(torch, dtype)) for dtype in dtypes}, x=x, tied=x, transposed=x.t(),
                          columns=x[:, 1:3], steps=x[::2, ::3], one=x[1, 2], scalar=torch.tensor(7),
                          none=torch.zeros(0, 3), repeated=x[0, 0].expand(2, 3), parameter=nn.Parameter(x[0].half()))
    tensors._metadata = OrderedDict(version=1)  # nn.Module.state_dict's is an attribute of the dict
    ours, left_out = converted(tensors, tmp_path, **options)
    assert equal(ours, tensors) and not left_out


def test_the_dict_under_state_dict_is_taken_or_the_one_with_most_tensors(tmp_path):
    model, other = {"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(1)}
    for content, taken, left in (({"state_dict": other, "ema": model}, other, ["ema (dict)"]),
                                 ({"model": model, "ema": other}, model, ["ema (dict)"]),
                                 (model | {"ema": other, "epoch": 3}, model, ["ema (dict)", "epoch (int)"])):
        ours, left_out = converted(content, tmp_path)
        assert equal(ours, taken) and left_out == left


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_safetensors_do_not_hold_is_left_out_and_named_without_control_characters(tmp_path):
    tensors = {"kept": torch.ones(2), "complex": torch.ones(2, dtype=torch.complex64),
               "sparse": torch.eye(2).to_sparse(), "\x1b[2J\n": {1: 2}, 2: torch.ones(1),
               "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
               "command": Calls(os.system, f"touch {tmp_path / 'ran'}")}
    content = {"state_dict": tensors, "hub": Calls(torch.hub.load, "somebody/code", "model")}
    ours, left_out = converted(content, tmp_path)
    assert equal(ours, {"kept": tensors["kept"]}) and not (tmp_path / "ran").exists()
    assert " ".join(line.split()[0] for line in left_out) == r"hub complex sparse \x1b[2J\n 2 quantized command"


@each_format
def test_a_lightning_checkpoint_opens_without_its_classes_and_what_is_left_out_is_named(tmp_path, monkeypatch, options):
    absent = types.ModuleType("pytorch_lightning")
    absent.Config = type("Config", (dict,), {"__module__": absent.__name__})
    monkeypatch.setitem(sys.modules, absent.__name__, absent)
    config = absent.Config(flags={1, 2}, frozen=frozenset([3]))
    config.parent = Path("a")
    model = {"model.diffusion_model.out.2.weight": torch.ones(2, 3)}
    torch.save({"epoch": 3, "state_dict": model, "hyper_parameters": config,
                "callbacks": {absent.Config: {("a", 1): b"bytes"}}, "optimizer_states": [{0: torch.ones(2)}]},
               tmp_path / "last.ckpt", **options)
    monkeypatch.setitem(sys.modules, absent.__name__, None)  # an import would raise
    _, left_out = convert(tmp_path / "last.ckpt", tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), model)
    assert left_out == ["epoch (int)", "hyper_parameters (Config)", "callbacks (dict)", "optimizer_states (list)"]


def test_a_controlnets_pickle_loads_after_its_conversion(cg, tmp_path, capsys):
    save_control(cg, tmp_path)
    file, out = tmp_path / "in.ckpt", tmp_path / "diffusion_pytorch_model.safetensors"
    out.unlink()
    torch.save({"state_dict": cg.state_dict(), "global_step": 840000, "optimizer_states": [{}]}, file)
    main(["convert", str(file), str(out)])
    assert equal_weights(load_control(tmp_path, "category"), cg)
    said = capsys.readouterr().out
    assert "342 tensors" in said and "left out: global_step (int), optimizer_states (list)" in said
    assert "it looks like a ControlNet" in said and f"give {out} where" in said


# ---------------------------------------------------------------- commands


def name(module: str, kind: str) -> bytes:
    """GLOBAL"""
    return f"c{module}\n{kind}\n".encode()


def text(content: str) -> bytes:
    """BINUNICODE"""
    return b"X" + struct.pack("<I", len(content)) + content.encode()


EXEC, EXTENSION = name("builtins", "exec"), 0xE0
COMMANDS = {  # pickles that make a file, each in another way: path -> bytes
    "os.system": lambda ran: pickle.dumps(Calls(os.system, f"touch {ran}"), 2),
    "eval": lambda ran: pickle.dumps(Calls(eval, f"open({str(ran)!r}, 'w')")),
    "subprocess": lambda ran: pickle.dumps(Calls(subprocess.check_call, ["touch", str(ran)])),
    "inside a state_dict": lambda ran: pickle.dumps({"state_dict": OrderedDict(a=Calls(os.system, f"touch {ran}"))}),
    "calls what a call returns": lambda ran: (
        b"\x80\x02" + name("builtins", "getattr") + name("builtins", "__import__") + text("builtins") + b"\x85R"
        + text("exec") + b"\x86R" + text(f"open({str(ran)!r}, 'w')") + b"\x85R."),
    "STACK_GLOBAL": lambda ran: (
        b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + text(f"open({str(ran)!r}, 'w')") + b"\x85R."),
    "NEWOBJ": lambda ran: (  # list(map(exec, [code]))
        b"\x80\x02" + name("builtins", "list") + name("builtins", "map") + EXEC
        + b"(" + text(f"open({str(ran)!r}, 'w')") + b"t\x86\x81\x85R."),
    "BUILD": lambda ran: (  # an attribute __setstate__, which the second BUILD calls
        b"\x80\x02" + name("types", "SimpleNamespace") + b")\x81}" + text("__setstate__") + EXEC + b"sb"
        + text(f"open({str(ran)!r}, 'w')") + b"b."),
    "EXT1": lambda ran: b"\x80\x02\x82" + bytes([EXTENSION]) + text(f"open({str(ran)!r}, 'w')") + b"\x85R.",
    "INST": lambda ran: b"(V" + f"open({str(ran)!r}, 'w')".encode() + b"\nibuiltins\nexec\n.",
    "OBJ": lambda ran: b"(" + EXEC + b"V" + f"open({str(ran)!r}, 'w')".encode() + b"\no.",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pickled", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("wrap", [archive, legacy])
def test_a_pickle_that_runs_a_command_when_loaded_runs_nothing_here(tmp_path, monkeypatch, pickled, wrap):
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("builtins", "exec"))
    monkeypatch.setitem(copyreg._extension_cache, EXTENSION, exec)  # taken from there without find_class
    ran, file = tmp_path / "ran", tmp_path / "in.ckpt"
    file.write_bytes(wrap(pickled(ran)))
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    ran.unlink()  # the file is as dangerous as it should be
    met, find = set(), Unpickler.find_class
    monkeypatch.setattr(Unpickler, "find_class", lambda self, *names: met.update(names) or find(self, *names))
    with contextlib.suppress(BadInput):
        convert(file, tmp_path / "out.safetensors")
    assert not ran.exists()
    assert met & {"system", "eval", "check_call", "exec", "__import__"} or b"\x82" in pickled(ran), "not reached"


def test_a_file_sets_no_attribute_of_torchs_functions(tmp_path):
    """This one would make torch.load write a text from the file to a file, in the old format."""
    function = name("torch._utils", "_rebuild_tensor")
    (tmp_path / "in.ckpt").write_bytes(legacy(b"\x80\x02" + function + b"N}" + text("dump_patches") + b"\x88s\x86b."))
    with pytest.raises(BadInput, match="holds no dict of tensors"):
        convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors")
    assert not hasattr(torch._utils._rebuild_tensor, "dump_patches")


# ---------------------------------------------------------------- files that are refused


def tensor(size: tuple, stride: tuple, offset: int = 0) -> Calls:
    """Is saved like a tensor of any size, in a storage of four numbers."""
    rebuild, (storage, *_) = torch.ones(4).__reduce_ex__(2)
    return Calls(rebuild, storage, offset, size, stride, False, OrderedDict())


def tar() -> bytes:
    """As torch 0.1 saved. torch.load would unpack it, devices and links included."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(tarfile.TarInfo("\udc80storages"))  # begins like a pickle
    return content.getvalue()


REFUSED = {  # a file's bytes, or what torch.save writes; what is said
    "nothing": (b"", "does not write such"), "HTML": (b"<!doctype html>", "does not write such"),
    "safetensors": (b"\x40" + bytes(7) + b'{"a":{"dtype":"F32"}}', "does not write such"),
    "tar": (tar(), "does not write such"),
    "pickle": (pickle.dumps({"a": [1, 2]}, 2), "Invalid magic number"),
    "TorchScript": (archive(b"N.", members=("version", "constants.pkl")), "a TorchScript"),
    "compressed": (archive(b"N.", zipfile.ZIP_DEFLATED), "a compressed zip"),
    "nested 100,000 deep": (archive(b"\x80\x04N" + b"\x85" * 100_000 + b"."), ""),
    "no tensors": ({"epoch": 3}, "holds no dict of tensors, but a dict"),
    "module": (nn.Linear(2, 2), "holds no dict of tensors, but a Linear"),
    "10^12 numbers": ({"a": tensor((10**12,), (1,))}, "resize storage"),
    "beyond the storage": ({"a": tensor((4,), (1,), 1)}, "resize storage"),
    "one number, 10^12 times": ({"a": tensor((10**12,), (0,))}, "repeat themselves"),
    "one tensor, by 1,000 names": (dict.fromkeys(map(str, range(1000)), torch.ones(9999)), "repeat themselves"),
}


@pytest.mark.parametrize("content, words", REFUSED.values(), ids=REFUSED)
def test_what_is_no_whole_checkpoint_or_would_fill_the_disk_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "in.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadInput, match=f"^{path} can't be converted .*{words}") as error:
        convert(path, tmp_path / "out.safetensors")
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    assert os.listdir(tmp_path) == ["in.pth"]


@pytest.mark.parametrize("out", ["out.ckpt", "in.safetensors"])
def test_the_output_ends_in_safetensors_and_a_refused_input_stays(tmp_path, out):
    (tmp_path / "in.safetensors").write_bytes(b"weights")
    with pytest.raises(BadInput, match="ends in .safetensors|can't be converted"):
        convert(tmp_path / "in.safetensors", tmp_path / out)
    assert os.listdir(tmp_path) == ["in.safetensors"] and (tmp_path / "in.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_damaged_file_is_converted_or_refused_and_never_crashes(tmp_path, options):
    """Files are cut at any place, or have a byte changed at random; the same seed gives the same files."""
    content = {"state_dict": OrderedDict(a=torch.ones(3, 2), b=torch.zeros(2).half()), "other": (Path("a"), 3.5, None)}
    torch.save(content, tmp_path / "in.pth", **options)
    good, dice, refused = (tmp_path / "in.pth").read_bytes(), random.Random(0), 0
    for i in range(100):
        at = dice.randrange(len(good))
        (tmp_path / "in.pth").write_bytes(good[:at] + (dice.randbytes(1) + good[at + 1 :] if i % 4 else b""))
        try:
            convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
            load_file(tmp_path / "out.safetensors")
        except BadInput:
            refused += 1
    assert 20 <= refused < 100
