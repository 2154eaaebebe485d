"""Tests: public pickles become safetensors bit for bit, and nothing in them runs."""

import contextlib
import copyreg
import os
import pickle
import random
import re
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
from conftest import SD1, randomise
from safetensors.torch import load_file
from test_public import original_unet, single  # noqa: F401  (a fixture)
from torch import nn

from model import ControlNet
from support.convert import Unpickler, convert
from support.files import BadInput
from weights import control_config, load_stable_diffusion, main

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4},
           "protocol 5": {"pickle_protocol": 5},
           "legacy, protocol 5": {"_use_new_zipfile_serialization": False, "pickle_protocol": 5}}
each_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def converted(content: object, folder: Path, **options) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Writes a file with torch.save and converts it -> the tensors, and what was left out."""
    torch.save(content, folder / "in.ckpt", **options)
    _, left_out = convert(folder / "in.ckpt", folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), left_out


def archive(path: Path, pickled: bytes, members: dict | None = None, compression=zipfile.ZIP_STORED) -> Path:
    """A zip as torch.save writes it, around a given pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **(members or {})}.items():
            file.writestr(f"archive/{name}", content)
    return path


def legacy(path: Path, pickled: bytes) -> Path:
    """A file as torch.save wrote it before version 1.6, around a given pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    before = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    path.write_bytes(before + pickled + pickle.dumps([], 2))
    return path


def refusal(path: Path) -> str:
    """The one line in which a file is refused."""
    with pytest.raises(BadInput) as error:
        convert(path, path.parent / "out.safetensors")
    assert str(path) in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 500
    assert not (path.parent / "out.safetensors").exists()
    return str(error.value)


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in ours.items())


# ---------------------------------------------------------------- tensors


@each_format
def test_every_type_of_number_comes_through_bit_for_bit(tmp_path, options):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool)
    bits = torch.randint(0, 2, (3, 5, 8), generator=torch.Generator().manual_seed(0))
    tensors = {str(dtype): (bits * 2.0 - 0.7).to(dtype) for dtype in dtypes}
    ours, left_out = converted(tensors, tmp_path, **options)
    assert equal(ours, tensors) and not left_out


@each_format
def test_views_scalars_empty_tensors_parameters_and_tied_weights(tmp_path, options):
    x = torch.arange(24.0).reshape(4, 6)
    tensors = OrderedDict(x=x, tied=x, transposed=x.t(), columns=x[:, 1:3], steps=x[::2, ::3], scalar=torch.tensor(7),
                          one=x[1, 2], none=torch.zeros(0, 3), repeated=torch.ones(1).expand(2, 3),
                          parameter=nn.Parameter(x[0].half()))
    tensors._metadata = OrderedDict(version=1)  # nn.Module.state_dict's is an attribute of the dict
    ours, left_out = converted(tensors, tmp_path, **options)
    assert equal(ours, tensors) and not left_out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_safetensors_do_not_hold_are_left_out_by_name(tmp_path):
    tensors = {"kept": torch.ones(2), "complex": torch.ones(2, dtype=torch.complex64),
               "sparse": torch.eye(2).to_sparse(),
               "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    ours, left_out = converted(tensors, tmp_path)
    assert equal(ours, {"kept": tensors["kept"]})
    assert [line.split()[0] for line in left_out] == ["complex", "sparse", "quantized"]


def test_the_dict_under_state_dict_is_taken_or_the_one_with_most_tensors(tmp_path):
    model, other = {"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(1)}
    for content, taken, left in (({"state_dict": other, "ema": model}, other, ["ema (dict)"]),
                                 ({"model": model, "ema": other}, model, ["ema (dict)"]),
                                 (model | {"ema": other, "epoch": 3}, model, ["ema (dict)", "epoch (int)"])):
        ours, left_out = converted(content, tmp_path)
        assert equal(ours, taken) and left_out == left


# ---------------------------------------------------------------- checkpoints


def class_in(module: str, kind: str, monkeypatch) -> type:
    """A class from a module that is not installed."""
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    setattr(sys.modules[module], kind, type(kind, (dict,), {"__module__": module}))
    return getattr(sys.modules[module], kind)


@each_format
def test_a_lightning_checkpoint_opens_without_its_classes_and_what_is_left_out_is_named(tmp_path, monkeypatch, options):
    config = class_in("omegaconf", "DictConfig", monkeypatch)(lr=1e-4)
    callback = class_in("pytorch_lightning", "ModelCheckpoint", monkeypatch)
    config.parent = {"flags": {1, 2}, "frozen": frozenset([3]), ("a", 1): b"bytes"}
    model = {"model.diffusion_model.out.2.weight": torch.ones(2, 3), "model_ema.decay": torch.tensor(0.5)}
    torch.save({"epoch": 3, "state_dict": model, "hyper_parameters": config,
                "callbacks": {callback: {"best": Path("a")}},
                "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}, 1: {"exp_avg": torch.ones(3)}}}]},
               tmp_path / "last.ckpt", **options)
    for module in ("omegaconf", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)  # an import would raise
    _, left_out = convert(tmp_path / "last.ckpt", tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), model)
    assert left_out == ["epoch (int)", "hyper_parameters (DictConfig)", "callbacks (dict)", "optimizer_states (list)"]


def test_a_stable_diffusion_ckpt_loads_after_its_conversion(single, tmp_path, capsys):  # noqa: F811
    file, (unet, vae, text), tensors = single(1)
    torch.save({"state_dict": tensors, "global_step": 840000, "optimizer_states": [{}]}, tmp_path / "sd.ckpt")
    main(["convert", str(tmp_path / "sd.ckpt"), str(tmp_path / "sd.safetensors")])
    sd = load_stable_diffusion(tmp_path / "sd.safetensors", tokenizer=file.parent / "tokenizer")
    for ours, saved in ((sd.unet, unet), (sd.vae, vae), (sd.text_encoder, text)):
        assert equal(ours.state_dict(), saved.state_dict())
    said = capsys.readouterr().out
    assert f"{len(tensors):,} tensors" in said and "left out: global_step (int), optimizer_states (list)" in said
    assert "it looks like a whole Stable Diffusion" in said and f"give {tmp_path / 'sd.safetensors'} where" in said


def test_a_controlnets_pth_loads_after_its_conversion(tmp_path, capsys):
    control = randomise(ControlNet(control_config(SD1, 8)))
    tensors = original_unet(control, "control_model.")
    torch.save(tensors, tmp_path / "control.pth")
    main(["convert", str(tmp_path / "control.pth"), str(tmp_path / "control.safetensors")])
    assert equal(load_file(tmp_path / "control.safetensors"), tensors)
    assert "it looks like a ControlNet" in capsys.readouterr().out


# ---------------------------------------------------------------- commands


def name(module: str, kind: str) -> bytes:
    """GLOBAL"""
    return f"c{module}\n{kind}\n".encode()


def text(content: str) -> bytes:
    """BINUNICODE"""
    return b"X" + struct.pack("<I", len(content)) + content.encode()


class Calls:
    """An object that is pickled as a function call, as any class may request."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


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


def reached(path: Path, monkeypatch) -> list[str]:
    """Converts a file, which may be refused -> the names that the unpickler met in it."""
    names = []
    monkeypatch.setattr(Unpickler, "find_class", lambda self, module, name, find=Unpickler.find_class: (
        names.append(name) or find(self, module, name)))
    try:
        convert(path, path.parent / "out.safetensors")
    except BadInput as error:
        assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 500
        names += ["extension"] * ("names an extension" in str(error))
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pickled", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("wrap", [archive, legacy])
def test_a_pickle_that_runs_a_command_when_loaded_runs_nothing_here(tmp_path, monkeypatch, pickled, wrap):
    monkeypatch.setitem(copyreg._inverted_registry, EXTENSION, ("builtins", "exec"))
    monkeypatch.setitem(copyreg._extension_cache, EXTENSION, exec)  # taken from there without find_class
    ran = tmp_path / "ran"
    wrap(tmp_path / "in.ckpt", pickled(ran))
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "in.ckpt", weights_only=False)
    assert ran.exists()  # the file is as dangerous as it should be
    ran.unlink()
    assert set(reached(tmp_path / "in.ckpt", monkeypatch)) & {
        "system", "eval", "check_call", "exec", "__import__", "extension"}
    assert not ran.exists()


def test_a_command_beside_tensors_is_named_among_what_is_left_out(tmp_path):
    ours, left_out = converted({"state_dict": {"a": torch.ones(2), "b": Calls(os.system, f"touch {tmp_path / 'ran'}")},
                                "hub": Calls(torch.hub.load, "somebody/code", "model")}, tmp_path)
    assert equal(ours, {"a": torch.ones(2)}) and not (tmp_path / "ran").exists()
    assert left_out == ["hub (load)", "b (system)"]


def test_torchs_own_functions_are_not_changed(tmp_path, monkeypatch):
    """With dump_patches set, the old format's containers would make torch.load write a text from the file to a file."""
    monkeypatch.chdir(tmp_path)
    function = name("torch._utils", "_rebuild_tensor")
    pickled = (b"\x80\x02" + function + b"N}(" + text("dump_patches") + b"\x88" + text("__name__") + text("a")
               + b"u\x86b0(" + text("module") + function + text("a.py") + text("print()") + b"tQ.")
    names = reached(legacy(tmp_path / "in.ckpt", pickled), monkeypatch)
    assert names == ["_rebuild_tensor"] * 2 and torch._utils._rebuild_tensor.__name__ == "_rebuild_tensor"
    assert not hasattr(torch._utils._rebuild_tensor, "dump_patches")
    assert [file.name for file in tmp_path.iterdir()] == ["in.ckpt"]


# ---------------------------------------------------------------- sizes

STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"  # of 4 numbers


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", storage: bytes = STORAGE) -> bytes:
    """A pickle of {"a": a tensor}."""
    return (b"\x80\x04}" + text("a") + name("torch._utils", "_rebuild_tensor_v2")
            + b"(" + storage + offset + size + stride + b"\x89}tRs.")


def number(n: int) -> bytes:
    """LONG1"""
    return b"\x8a\x08" + n.to_bytes(8, "little", signed=True)


def storage_of(n: bytes) -> bytes:
    """STORAGE, but with another count of numbers."""
    return STORAGE.replace(b"K\x04", n)


HUGE = number(10**12)
BOMBS = {  # what each asks for
    "a string of 2^40 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
    "a bytearray of 2^40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
    "a memo of 2^31 entries": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes(10^12)": b"\x80\x02" + name("builtins", "bytes") + HUGE + b"\x85R.",
    "a tensor of 10^12 numbers": tensor(HUGE + b"\x85", b"K\x01\x85"),
    "a tensor that repeats one number": tensor(HUGE + b"\x85", b"K\x00\x85"),
    "a storage of 10^12 numbers": tensor(HUGE + b"\x85", b"K\x01\x85", storage=storage_of(HUGE)),
    "a product of sizes beyond 64 bits": tensor((number(2**40) * 3 + b"\x87"), b"K\x00K\x00K\x00\x87"),
    "nested 100,000 deep": b"\x80\x04N" + b"\x85" * 100_000 + b".",
}


def test_a_small_file_does_not_fill_memory_or_disk(tmp_path):
    """They are read in a process that may take 500 MB more than its imports."""
    for i, pickled in enumerate(BOMBS.values()):
        archive(tmp_path / f"{i:02}.pth", pickled, {"data/0": bytes(16)})
        legacy(tmp_path / f"legacy {i:02}.pth", pickled)
    large = tensor(number(250_000) + b"\x85", b"K\x01\x85", storage=storage_of(number(250_000)))
    archive(tmp_path / "compressed.pth", large, {"data/0": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    names = b"\x94s(" + b"".join(text(f"{i}") + b"h\x00" for i in range(1000)) + b"u."  # of one and the same tensor
    archive(tmp_path / "many names.pth", large.removesuffix(b"s.") + names, {"data/0": bytes(10**6)})
    program = """
import resource, sys
from pathlib import Path
from support.convert import convert
from support.files import BadInput
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20),) * 2)
for file in sorted(Path(sys.argv[1]).glob("*.pth")):
    try:
        convert(file, file.with_suffix(".safetensors"))
    except BadInput as error:
        print(file.stem, error)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2 * len(BOMBS) + 2 and not list(tmp_path.glob("*.safetensors"))
    assert "repeat themselves" in said[-1] and "compressed" in said[len(BOMBS)]


@pytest.mark.parametrize("pickled", [
    tensor(b"K\x05\x85", b"K\x01\x85"), tensor(b"K\x03\x85", b"K\x02\x85"),
    tensor(b"K\x04\x85", b"K\x01\x85", b"K\x01"), tensor(b"K\x04\x85", b"K\x01\x85", number(-1)),
    tensor(number(-4) + b"\x85", b"K\x01\x85"),
    tensor(b"K\x02\x85", number(-1) + b"\x85"), tensor(b"K\x04\x85", b"K\x01K\x01\x86"),
    tensor(b"\x88\x85", b"K\x01\x85"), tensor(text("4"), text("1")),
], ids=["size", "stride", "offset", "offset < 0", "size < 0", "stride < 0", "dimensions", "bool", "text"])
def test_a_tensor_must_lie_in_its_storage(tmp_path, pickled):
    refusal(archive(tmp_path / "in.pth", pickled, {"data/0": bytes(16)}))


# ---------------------------------------------------------------- other files


def tar(path: Path) -> None:
    """As torch 0.1 saved. torch.load would unpack it, devices and links included."""
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("\udc80storages"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("write, words", [
    (lambda f: f.write_bytes(b""), "does not write such"),
    (lambda f: f.write_text("\n<!doctype html><title>404</title>" * 9), "does not write such"),
    (lambda f: f.write_bytes(b"\x40" + bytes(7) + b'{"a":{"dtype":"F32"}}'), "does not write such"),
    (lambda f: f.write_bytes(pickle.dumps({"a": [1, 2]}, 2)), "Invalid magic number"),
    (lambda f: torch.save([torch.ones(2)], f), "holds no dict of tensors, but a list"),
    (lambda f: torch.save({"epoch": 3}, f), "holds no dict of tensors, but a dict"),
    (lambda f: torch.save(nn.Linear(2, 2), f), "holds no dict of tensors, but a Linear"),
    (lambda f: f.mkdir(), "Is a directory"), (lambda f: None, "No such file"), (tar, "does not write such"),
    (lambda f: torch.jit.script(nn.Linear(2, 2)).save(f), "a TorchScript"),
    (lambda f: zipfile.ZipFile(f, "w").writestr("big-lama/models/best.ckpt", b""), "can't be converted"),
], ids=["empty", "HTML", "safetensors", "pickle", "list", "no tensors", "module", "folder", "missing", "tar",
        "TorchScript", "outer zip"])
def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path, write, words):
    write(tmp_path / "in.pth")
    assert re.search(words, refusal(tmp_path / "in.pth"))


@pytest.mark.parametrize("out", ["out.ckpt", "out", "in.safetensors"])
def test_the_output_ends_in_safetensors_and_a_refused_input_stays(tmp_path, out):
    torch.save({"a": torch.ones(2)}, tmp_path / "in.safetensors")
    before = (tmp_path / "in.safetensors").read_bytes()
    with pytest.raises(BadInput, match="ends in .safetensors|can't be converted"):
        convert(tmp_path / "in.safetensors", tmp_path / out)
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_names_from_a_file_reach_the_terminal_without_control_characters(tmp_path):
    _, left_out = converted({"a": torch.ones(2), "\x1b[2J\n": {1: 2}, 2: torch.ones(1)}, tmp_path)
    assert left_out == [r"\x1b[2J\n (dict)", "2 (Tensor)"]


@pytest.mark.parametrize("options", [FORMATS["zip"], FORMATS["legacy"]], ids=["zip", "legacy"])
def test_a_damaged_file_is_converted_or_refused_and_never_crashes(tmp_path, options):
    """Files are cut at any place, or have bytes changed at random; the same seed gives the same files."""
    torch.save({"state_dict": OrderedDict(a=torch.ones(3, 2).t(), b=torch.zeros(2).half()), "epoch": 1,
                "other": {"c": Path("a"), 1: (2, 3.5, None, True)}}, tmp_path / "good.pth", **options)
    good, dice = (tmp_path / "good.pth").read_bytes(), random.Random(0)
    refused = 0
    for i in range(200):
        damaged = bytearray(good)
        for _ in range(dice.randint(1, 3)):
            damaged[dice.randrange(len(good))] = dice.randrange(256)
        (tmp_path / "in.pth").write_bytes(damaged if i % 6 else good[: dice.randrange(len(good))])
        try:
            convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
            load_file(tmp_path / "out.safetensors")
        except BadInput:
            refused += 1
    assert 50 <= refused < 200
