"""The same device package on x86-64 and, emulated, on aarch64: equal bits where bits are promised, nearly equal numbers elsewhere.

Unpacks an emulator (qemu in user mode), an aarch64 Python and aarch64 wheels below --work, with apt-get, dpkg-deb and pip and without being
root; nothing of the system is changed. Then `device_program.py` runs with each package here and on each emulated processor. A machine that
cannot be set up so is a reason that is printed, and status 0; a difference is status 1.

    python benchmarks/portability/check.py --work runs/portability
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from device_program import SCALE, point

import cooperllm
from cooperllm.assembly import Material, initial_theta, write_device_package
from cooperllm.cloud import MapFitter
from cooperllm.config import RunConfig, SourceConfig, Variant
from cooperllm.link.codec import encode

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("device_program.py")
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "msgspec", "jaxtyping")
"""What the device's modules import; here and there in the same versions."""

DEBIAN_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
OLDEST_GLIBC, NEWEST_GLIBC = 17, 36
"""Minor versions that a wheel may be built for; 2.36 is Debian 12's."""

LARGEST_DIFFERENCE = 1e-5
"""Of float32 slopes: length of the difference of all, as a share of their own. A loss of size 1 is rounded by 6e-8, a slope by 6e-6."""

NUM_TEXTS = 8


@dataclass(frozen=True)
class Processor:
    """What is emulated.

    Attributes:
        board: Where it is found.
        part: Its number in /proc/cpuinfo.
    """

    board: str
    part: str


# None of them has SVE: under qemu 7.2 an integer kernel of another runtime gave wrong losses with it.
PROCESSORS = {"cortex-a72": Processor("Raspberry Pi 4", "0xd08"), "cortex-a76": Processor("Raspberry Pi 5", "0xd0b")}
PACKAGES = (("tiny", Variant.FP32), ("tiny", Variant.INT8), ("demo", Variant.FP32), ("demo", Variant.INT8))


class UnavailableError(Exception):
    """Why this machine cannot be another one."""


@dataclass(frozen=True)
class Emulator:
    """An aarch64 Python that runs here.

    Attributes:
        qemu: The emulator's program.
        root: Where the other machine's files are.
        libraries: Where its Python packages are.
    """

    qemu: Path
    root: Path
    libraries: Path

    def command(self, processor: str, *arguments: str) -> list[str]:
        """Gives the command line of a Python program; `cpuinfo`, which ONNX Runtime asks, must not find the host's processor."""
        lines = (
            f"processor\t: {number}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {PROCESSORS[processor].part}\n\n"
            for number in range(os.cpu_count() or 1)
        )
        file = self.root / "proc" / "cpuinfo"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines))
        return [str(self.qemu), "-cpu", processor, "-L", str(self.root), str(_python(self.root)), *arguments]


def set_up(work: Path) -> Emulator:
    """Fetches what is missing.

    Raises:
        UnavailableError: If it cannot be had, or does not run.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise UnavailableError(f"this is {platform.system()} on {platform.machine()}; the check compares x86-64 Linux with aarch64")
    absent = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if absent:
        raise UnavailableError(f"found no {absent[0]}; aarch64 packages of the system come from a Debian archive")
    apt = _apt(work / "apt")
    root, qemu = work / "root", work / "qemu-aarch64-static"
    if not root.is_dir() or not qemu.is_file():
        print(f"{work}: downloading package lists, about 20 MB", flush=True)
        _call([*apt, "update"])
    if not root.is_dir():
        print(f"{root}: downloading and unpacking an aarch64 Python, about 16 MB", flush=True)
        _call([*apt, "install", "--yes", "--download-only", "--no-install-recommends", *DEBIAN_PACKAGES])
        _unpack(sorted((work / "apt" / "cache" / "archives").glob("*.deb")), root)
    if not qemu.is_file():
        print(f"{qemu}: downloading qemu-user-static, about 60 MB", flush=True)
        _call([*apt, "download", "qemu-user-static:amd64"], cwd=work / "apt")
        _unpack(list((work / "apt").glob("qemu-user-static_*.deb")), work / "qemu")
        (work / "qemu" / "usr" / "bin" / qemu.name).replace(qemu)
        shutil.rmtree(work / "qemu")
    emulator = Emulator(qemu, root, _libraries(work / "libraries", _python(root).name.removeprefix("python")))
    machine = _call(emulator.command(next(iter(PROCESSORS)), "-c", "import platform; print(platform.machine())")).strip()
    if machine != "aarch64":
        raise UnavailableError(f"the emulated Python says that it runs on {machine!r}")
    return emulator


def _python(root: Path) -> Path:
    return (root / "usr" / "bin" / "python3").resolve()


def _apt(place: Path) -> list[str]:
    """The system's archives, with lists and downloads in a place of our own, for a machine on which nothing is installed."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "status").touch()
    settings = {
        "Dir::State": place / "state",
        "Dir::State::status": place / "status",
        "Dir::Cache": place / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64,amd64",
        "APT::Sandbox::User": "root",
    }
    return ["apt-get", "--quiet", *(text for key, value in settings.items() for text in ("-o", f"{key}={value}"))]


def _unpack(archives: Sequence[Path], target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for archive in archives:
        _call(["dpkg-deb", "--extract", str(archive), str(part)])
    part.replace(target)


def _libraries(target: Path, python_version: str) -> Path:
    wanted = [f"{name}=={metadata.version(name)}" for name in LIBRARIES]
    listed = target / "wanted.txt"
    if not listed.is_file() or listed.read_text().split() != wanted:
        print(f"{target}: downloading aarch64 wheels of {', '.join(wanted)} and what they need, about 60 MB", flush=True)
        shutil.rmtree(target, ignore_errors=True)
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(OLDEST_GLIBC, NEWEST_GLIBC + 1)]
        options = ["--quiet", "--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}", f"--target={target}"]
        _call([sys.executable, "-m", "pip", "install", *options, *platforms, "--platform=manylinux2014_aarch64", *wanted])
        listed.write_text("\n".join(wanted))
    return target


def _call(command: Sequence[str], cwd: Path | None = None) -> str:
    found = subprocess.run(command, cwd=cwd, env=_environment({}), capture_output=True, text=True, check=False)
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.strip()] or ["no word"]
        raise UnavailableError(f"`{' '.join(command[:2])} ...` ended with status {found.returncode}: {lines[-1]}")
    return found.stdout


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """One thread; libraries that are loaded before others are the host's."""
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return plain | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more


def write_packages(work: Path, packages: Sequence[tuple[str, Variant]] = PACKAGES) -> dict[str, tuple[Path, Path]]:
    """Writes packages anew, with texts and maps to use them with: (package, what is given) by name."""
    found: dict[str, tuple[Path, Path]] = {}
    for recipe in dict.fromkeys(name for name, _ in packages):
        few = replace(RunConfig().data, public=SourceConfig(max_examples=64), private=SourceConfig(max_examples=64), num_test=2)
        config = replace(cooperllm.recipe(recipe).config, data=replace(few, num_validation=2))
        material, given = Material(config), work / f"{recipe}-given"
        shutil.rmtree(given, ignore_errors=True)
        given.mkdir()
        texts = material.task.private.take(range(NUM_TEXTS))
        plain = {"texts": texts.texts, "second_texts": texts.second_texts, "labels": texts.labels}
        (given / "texts.json").write_text(json.dumps(plain), encoding="utf8")
        for variant in (variant for name, variant in packages if name == recipe):
            path = work / f"{recipe}-{variant.value}"
            shutil.rmtree(path, ignore_errors=True)
            write_device_package(config, material, path, variant)
            found[path.name] = path, given
        fitter = MapFitter(material.model, material.public, num_examples=32, num_components=8, rank=8, bits=8, most_blocks=2)
        maps = fitter.fit(point(initial_theta(config, material.model)), 1, 1)
        if maps is not None:
            (given / "maps.bin").write_bytes(encode(maps))
    return found


def run_program(command: Sequence[str], result: Path, paths: tuple[Path, Path], places: Sequence[Path]) -> dict[str, Any]:
    """Runs the device's program in a process of its own."""
    arguments = [str(PROGRAM), str(paths[0]), str(paths[1]), str(result)]
    environment = _environment({"PYTHONPATH": os.pathsep.join(map(str, places))})
    subprocess.run([*command, *arguments], env=environment, check=True)
    return json.loads(result.read_text())


@dataclass(frozen=True)
class Comparison:
    """One package on two machines.

    Attributes:
        package: Its name.
        processor: The other machine.
        unequal: Names of digests and tokens that differ; must be none.
        golden: Largest difference of a golden loss from PyTorch's: (here, there).
        losses: Largest difference between the golden losses of both.
        slopes: Length of the difference of all slopes, as a share of their own.
        largest: Largest difference of a slope.
        estimate: Length of the difference of the estimates, as a share of the estimate's.
        seconds: CPU seconds: (here, there).
    """

    package: str
    processor: str
    unequal: tuple[str, ...]
    golden: tuple[float, float]
    losses: float
    slopes: float
    largest: float
    estimate: float
    seconds: tuple[float, float]

    @property
    def complaint(self) -> str | None:
        """What should not be, as a sentence."""
        where = f"{self.package} on {self.processor}"
        if self.unequal:
            return f"{where}: other bits of {', '.join(self.unequal)} found, the same expected"
        if self.package.endswith(Variant.FP32.value) and not self.slopes <= LARGEST_DIFFERENCE:
            return f"{where}: slopes differ by {self.slopes:.1e} of their length, at most {LARGEST_DIFFERENCE:.0e} expected"
        return None


def compare(package: str, processor: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Comparison:
    """Compares two results of the device's program."""
    names = sorted(set(here["digests"]) | set(there["digests"]))
    unequal = [name for name in names if here["digests"].get(name) != there["digests"].get(name)]
    arrays = {name: (np.array(here[name]), np.array(there[name])) for name in ("golden", "slopes", "estimate")}
    lengths = {name: float(np.linalg.norm(one - other) / np.linalg.norm(one)) for name, (one, other) in arrays.items()}
    largest = {name: float(np.abs(one - other).max()) for name, (one, other) in arrays.items()}
    golden = [float(np.abs(one - here["expected"]).max()) for one in arrays["golden"]]
    return Comparison(
        package=package,
        processor=processor,
        unequal=tuple(unequal + ["tokens"] * (here["token_ids"] != there["token_ids"])),
        golden=(golden[0], golden[1]),
        losses=largest["golden"],
        slopes=lengths["slopes"],
        largest=largest["slopes"],
        estimate=lengths["estimate"],
        seconds=(here["cpu_seconds"], there["cpu_seconds"]),
    )


def table(rows: Sequence[Comparison]) -> list[str]:
    """Lays comparisons out as Markdown."""
    lines = [
        "| package | aarch64 processor | bits | golden losses off PyTorch's, here / there | between both | slopes | largest of a slope "
        "| estimate | CPU s here / there |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.package,
            f"{row.processor} ({PROCESSORS[row.processor].board})",
            f"differ: {', '.join(row.unequal)}" if row.unequal else "equal",
            " / ".join(f"{value:.1e}" for value in row.golden),
            *(f"{value:.1e}" for value in (row.losses, row.slopes, row.largest, row.estimate)),
            " / ".join(f"{value:.1f}" for value in row.seconds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Sets up, runs, compares, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for everything that is downloaded and written, about 700 MB")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        emulator = set_up(work)
    except UnavailableError as reason:
        print(f"skipped: {reason}")
        return
    source, rows, results = ROOT / "src", list[Comparison](), list[dict[str, Any]]()
    for name, paths in write_packages(work).items():
        here = run_program([sys.executable], work / f"{name}-here.json", paths, [source])
        for processor in PROCESSORS:
            command, result = emulator.command(processor), work / f"{name}-{processor}.json"
            results.append(run_program(command, result, paths, [source, emulator.libraries]))
            rows.append(compare(name, processor, here, results[-1]))
            print(table(rows)[-1], flush=True)
    date, there = datetime.date.today(), results[-1]
    libraries = ", ".join(f"{name} {version}" for name, version in there["libraries"].items())
    lines = [
        f"# The same package on x86-64 and on aarch64, {date}",
        "",
        f"Command: `python benchmarks/portability/check.py --work DIR`; {_call([str(emulator.qemu), '--version']).splitlines()[0]}; Python "
        f"{platform.python_version()} here, {there['python']} there; {libraries} on both. One thread. Emulated seconds say nothing "
        "of a real processor.",
        "",
        f"Compared bit by bit: {', '.join(there['digests'])}, tokens. Slopes along 20 directions, μ = {SCALE}, and an estimate with maps "
        f"where there are any, on {NUM_TEXTS} texts: length of the difference, as a share of the length here.",
        "",
        *table(rows),
    ]
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"portability_x86_64_aarch64_{date}.md").write_text("\n".join(lines) + "\n")
    complaints = [row.complaint for row in rows if row.complaint is not None]
    print("\n".join([*table(rows), *complaints]))
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
