"""Run the kernels of amx_bf16 in Bochs, an emulator of processors with AMX, and compare the bits of their results.

`amx_emulated.py BOCHS` records calls of the C++ library with bfloat16 products. Two programs make them again: one with
`PlainTiles` (tiles.h) on this processor, which needs AVX-512 BF16, and one with the tile instructions in Bochs. All
tensors must have the same bits afterwards, and `itm_tiles` must find its products right. BOCHS is the folder `bochs` of
its source, built by

    ./configure --with-nogui --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx && make

Until Bochs has mended it, VCVTNE2PS2BF16_MASK_VphHpsWpsR of cpu/avx/avx512_bf16.cc takes half of its results from
beside its operands: `op1.vmm32u(n)` there must be `op1.vmm32u(n - DWORD_ELEMENTS(len))`.

There is no operating system in Bochs: tests/amx/ loads a program, and answers its system calls.
"""

from __future__ import annotations

import argparse
import ctypes
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import itm_fast
from itm_fast import _native
from itm_fast._native import compiling
from itm_fast.ops import _cpu_calls

HERE = Path(__file__).parent / "amx"
LOADER, PROGRAM, CHUNK = 0x3F0000, 0x400000, 32 << 10  # addresses; bytes that boot.S reads at once
CYLINDER = 16 * 63 * 512  # bytes of the disk
LENGTHS = (1, 7, 12, 4, 19, 2)  # words of the captions
SECONDS = 600  # for Bochs


def record() -> tuple[bytes, list[str]]:
    """Calls with bfloat16 products, as replay.cpp reads them, and the names of the functions that they call."""
    records: list[bytes] = []
    names: list[str] = []

    def recorded(self, function, args, size, results, gradients=()):
        call, tensors = self._filled(args, size, results, gradients)
        if call.bfloat16:
            if function not in names:
                names.append(function)
            records.append(_record(names.index(function), call, tensors))
        _native.call(function, ctypes.byref(call))

    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    usual = _cpu_calls.Calls._call
    _cpu_calls.Calls._call = recorded  # type: ignore[method-assign]
    try:
        for score in _scores():
            if score.requires_grad:
                score.float().square().sum().backward()
    finally:
        _cpu_calls.Calls._call = usual  # type: ignore[method-assign]
    return struct.pack("<Q", len(records)) + b"".join(records), names


def _scores() -> Iterator[torch.Tensor]:
    for dtype in (torch.float32, torch.bfloat16):
        for direction in ("t2i", "i2t"):
            for pool, norm in (("lse", "clipped_l2norm"), ("mean", "softmax"), ("sum", "l2norm")):
                options = {"direction": direction, "pool": pool, "affinity_norm": norm}
                yield itm_fast.cross_attention_score(*_inputs(13, 72, dtype), scale=9.0, **options)
        yield itm_fast.cross_attention_score(*_inputs(36, 256, dtype), direction="t2i", scale=9.0, pool="lse")
        small = {"sim_dim": 48}
        for name, options in (("sgr", small), ("saf", small), ("shan", {}), ("shan", {"gate": "vector"})):
            scorer = itm_fast.models.scorer(name, dim=64, regions=13, **options).to(dtype)
            for training in (True, False):
                yield scorer.train(training)(*_inputs(13, 64, dtype))
            with torch.no_grad():
                yield scorer(*_inputs(13, 64, dtype))


def _inputs(regions: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    words, cu_seqlens = itm_fast.pack(torch.randn(len(LENGTHS), max(LENGTHS), dim), LENGTHS)
    image = torch.randn(5, regions, dim)
    return image.to(dtype).requires_grad_(), words.to(dtype).requires_grad_(), cu_seqlens


def _record(function: int, call: ctypes.Structure, tensors: list[torch.Tensor]) -> bytes:
    """The number of the function, the words of its struct, the tensors, and which words point to which of them."""
    call.threads = 1
    words = struct.unpack(f"<{ctypes.sizeof(call) // 8}Q", bytes(call))
    held = [x.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes() for x in tensors]
    at = {x.data_ptr(): k for k, x in enumerate(tensors)}
    pointers = [
        (place, at[word])
        for place, (word, field) in enumerate(zip(words, call._fields_))
        if field[1] is ctypes.c_void_p and word and word in at  # an empty tensor lies at 0, as null does
    ]
    parts = [struct.pack(f"<{3 + len(words)}Q", function, len(words), len(held), *words)]
    parts.append(struct.pack(f"<{len(held)}Q", *map(len, held)))
    parts += [x + bytes(-len(x) % 8) for x in held]
    parts.append(struct.pack(f"<{1 + 2 * len(pointers)}Q", len(pointers), *(x for pair in pointers for x in pair)))
    return b"".join(parts)


def build(folder: Path, level: str, calls: bytes, names: list[str]) -> Path:
    """replay.cpp with the library of a level, in one static program; below amx_bf16 with `PlainTiles`."""
    compiler = compiling.find_compiler()
    sources = compiling.sources_in(_native.csrc_dir())
    if level != "amx_bf16":
        before = b"#if defined(__AMX_BF16__)\n  if constexpr (IS_PAIR<E>) return multiply_by_tiles(AmxTiles::ready()"
        after = b"#if 1\n  if constexpr (IS_PAIR<E>) return multiply_by_tiles(PlainTiles(TileShapes())"
        assert sources["cpu/gemm.h"].count(before) == 1, "gemm.h has another product by tiles than this script expects"
        sources["cpu/gemm.h"] = sources["cpu/gemm.h"].replace(before, after)
    folder.mkdir()
    compiling.lay_out(sources, folder)
    compiling.compile_libraries(compiler, {level: ""}, folder, time.monotonic() + 3 * compiling.SECONDS)
    (folder / "calls.bin").write_bytes(calls)
    declared = "".join(f'extern "C" const char* {name}(const void*);\n' for name in names)
    rows = ", ".join(f'{{"{name}", {name}}}' for name in names)
    table = "const struct { const char* name; const char* (*run)(const void*); } FUNCTIONS[] = "
    (folder / "functions.h").write_text(f"{declared}{table}{{{rows}}};\n")
    flags = [*compiling.LEVELS[level], "-std=c++20", "-O1", "-I.", "-static", "-pthread"]
    objects = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.o"))
    _run([*compiler.command, *flags, HERE / "replay.cpp", *objects, "-o", "replay"], folder)
    return folder / "replay"


def disk(program: Path, folder: Path) -> Path:
    """A disk that boots the program."""
    _run(["gcc", "-O1", "-mgeneral-regs-only", "-mno-red-zone", "-ffreestanding", "-fno-stack-protector", "-fno-pic",
          "-nostdlib", "-static", f"-Wl,-N,-Ttext={LOADER:#x},--build-id=none,-e,0", "-o", "loader",
          HERE / "loader.S", HERE / "loader.c"], folder)  # fmt: skip
    memory = _loaded((folder / "loader").read_bytes(), LOADER)
    assert len(memory) <= PROGRAM - LOADER
    memory += bytes(PROGRAM - LOADER - len(memory)) + _loaded(program.read_bytes(), PROGRAM)
    chunks = -(-len(memory) // CHUNK)
    _run(["gcc", "-c", f"-DCHUNKS={chunks}", HERE / "boot.S", "-o", "boot.o"], folder)
    _run(["ld", "-Ttext", "0x7c00", "--oformat", "binary", "boot.o", "-o", "boot"], folder)
    whole = (folder / "boot").read_bytes() + memory + bytes(chunks * CHUNK - len(memory))
    (folder / "disk").write_bytes(whole + bytes(-len(whole) % CYLINDER))
    return folder / "disk"


def _loaded(elf: bytes, address: int) -> bytes:
    """What an ELF file holds in memory from an address on."""
    memory = bytearray()
    headers, size = struct.unpack_from("<Q", elf, 32)[0], struct.unpack_from("<H", elf, 54)[0]
    for k in range(struct.unpack_from("<H", elf, 56)[0]):
        kind, _, offset, at, _, held, wanted, _ = struct.unpack_from("<IIQQQQQQ", elf, headers + k * size)
        if kind == 1:
            memory += bytes(max(0, at - address + wanted - len(memory)))
            memory[at - address : at - address + held] = elf[offset : offset + held]
    return bytes(memory)


def emulate(bochs: Path, image: Path) -> list[str]:
    """The lines that the program on a disk prints in Bochs."""
    settings = f"""
        cpu: model=sapphire_rapids, ips=100000000
        memory: guest=1024, host=1024
        romimage: file={bochs}/bios/BIOS-bochs-latest
        vgaromimage: file={bochs}/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
        ata0: enabled=1
        ata0-master: type=disk, path={image}, mode=flat
        boot: disk
        port_e9_hack: enabled=1
        display_library: nogui
        log: bochs.log
    """
    (image.parent / "bochsrc").write_text("\n".join(line.strip() for line in settings.strip().splitlines()))
    command = [str(bochs / "bochs"), "-q", "-f", "bochsrc"]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=image.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, errors="replace") as process:  # fmt: skip
        assert process.stdout is not None
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        for line in process.stdout:
            lines.append(line.rstrip())
            if lines[-1] in ("ended", "failed"):
                process.kill()
        late.cancel()
    return lines


def _run(command: list[str | Path], folder: Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bochs", type=Path, help="the folder `bochs` of its source, built")
    bochs = parser.parse_args().bochs.resolve()
    if not (bochs / "bochs").is_file():
        parser.error(f"{bochs} holds no program `bochs`; build it as `--help` says")
    if not _native.bfloat16_products()[0]:
        parser.error("this processor has no products of bfloat16 values to record")
    calls, names = record()
    with tempfile.TemporaryDirectory() as scratch:
        plain = build(Path(scratch, "plain"), "avx512_bf16", calls, names)
        expected = subprocess.run([plain], capture_output=True, text=True, check=True).stdout.splitlines()
        tiles = build(Path(scratch, "tiles"), "amx_bf16", calls, names)
        said = emulate(bochs, disk(tiles, tiles.parent))
    found = [line for line in said if line.split(" ")[0] in names]
    for line, other in zip(expected, found):
        print(line.split(" ")[0], "same bits" if line == other else "OTHER BITS")
    right = "itm_tiles: y" in said
    if len(found) < len(expected) or not right:
        print("Bochs ended with:", *said[-5:], sep="\n")
    print(f"{len(found)} of {len(expected)} calls ran, of {len(names)} functions; itm_tiles: {'y' if right else 'n'}")
    return int(found != expected or not right)


if __name__ == "__main__":
    raise SystemExit(main())
