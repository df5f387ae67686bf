"""What the wheel holds, and that it is enough for the main job, far from the source and without a network."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from backbone.adapters.lora import LORA_WEIGHTS
from backbone.models.cache import VARIABLE

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbone", "customize", "edit", "align", "limner")
CONTROL_LIMIT = 12e6  # bytes of the networks that read maps
WEIGHTS_LIMIT = 80e6  # bytes
WHEEL_LIMIT = 110e6  # bytes, packed

# Found by every Python that has its folder on the path, before anything else runs.
SITECUSTOMIZE = """
import os
import socket

INTERNET = (socket.AF_INET, socket.AF_INET6)


def refused(name):
    original = getattr(socket.socket, name)

    def method(self, *arguments):
        if self.family in INTERNET:
            refuse(arguments)
        return original(self, *arguments)

    return method


def refuse(*what):
    with open(os.environ["ATTEMPTS"], "a") as file:
        print(*what, file=file)
    raise OSError("there is no network in this test")


for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refused(name))
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""


class Offline:
    """Runs commands in an empty folder, in an empty home, with every connection refused and written down."""

    def __init__(self, folder: Path, *, python_path: tuple[Path, ...] = ()) -> None:
        self.folder = folder / "elsewhere"
        self.attempts = folder / "attempts.txt"
        guard, home = folder / "guard", folder / "home"
        for made in (self.folder, guard, home):
            made.mkdir()
        (guard / "sitecustomize.py").write_text(SITECUSTOMIZE)
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        self.environment = kept | {
            "PYTHONPATH": os.pathsep.join(map(str, (guard, *python_path))),
            "ATTEMPTS": str(self.attempts),
            "HOME": str(home),
            VARIABLE: str(folder / "cache"),
        }
        self.environment.pop("XDG_CACHE_HOME", None)

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from the source tree with the environment's own build backend.

    Nothing is compressed: that takes twenty times as long as all of the rest.
    """
    folder = tmp_path_factory.mktemp("wheel")
    program = """
import zlib
zlib.Z_DEFAULT_COMPRESSION = zlib.Z_NO_COMPRESSION
from hatchling.cli import hatchling
hatchling()
"""
    build = [sys.executable, "-c", program, "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    """What lies in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what lies in the wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def offline(unpacked: Path, tmp_path: Path) -> Offline:
    """A folder far from the source whose Python finds the unpacked wheel first."""
    return Offline(tmp_path, python_path=(unpacked,))


def test_the_wheel_holds_the_five_packages_and_nothing_else(names: set[str]) -> None:
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        *((package, "*.py") for package in PACKAGES),
        ("backbone/moji", "*.safetensors"),
        ("backbone/moji", "*.json"),
        ("backbone/families/configs", "*.json"),
        ("backbone/world", "vocabulary.json"),
        ("backbone/world/rendering", "labels.json"),
        ("customize/examples", "*.png"),
        ("customize/examples", "*.txt"),
        ("backbone/examples", "*.png"),
        ("backbone/examples", "*.txt"),
        *((package, "py.typed") for package in PACKAGES),
    ],
)
def test_the_wheel_holds_every_file_that_is_needed(names: set[str], folder: str, pattern: str) -> None:
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}
    assert source, f"{folder} has no {pattern}"
    assert source - names == set()


def test_the_wheel_holds_the_licence_and_the_font_s_credit(names: set[str]) -> None:
    assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_the_embedded_weights_stay_small() -> None:
    folder = ROOT / "backbone" / "moji"
    weights = {*folder.rglob("*.safetensors")}
    control = {*(folder / "control").rglob("*.safetensors")}
    assert 0 < sum(path.stat().st_size for path in weights - control) <= WEIGHTS_LIMIT
    assert 0 < sum(path.stat().st_size for path in control) <= CONTROL_LIMIT


@pytest.mark.slow
def test_the_wheel_packs_into_what_is_small_enough_to_fetch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = sum(len(zlib.compress(archive.read(name))) for name in archive.namelist())
    assert packed <= WHEEL_LIMIT


def test_the_blocked_network_is_blocked(offline: Offline) -> None:
    program = "import urllib.request as r; r.urlopen('http://{}:9')"
    for host in ("127.0.0.1", "example.org"):
        done = offline.run(sys.executable, "-c", program.format(host), check=False)
        assert "there is no network in this test" in done.stderr
    assert len(offline.attempts.read_text().splitlines()) == 2


def test_an_unpacked_wheel_is_found_instead_of_the_source(offline: Offline) -> None:
    program = "import backbone, customize, edit, align; print(backbone.__path__, customize.__path__)"
    said = offline.run(sys.executable, "-c", program).stdout
    assert "unpacked" in said
    assert str(ROOT) not in said


def test_the_doors_of_an_unpacked_wheel_open(offline: Offline) -> None:
    for package in ("customize", "edit", "align", "limner"):
        assert "Usage" in offline.run(sys.executable, "-m", package, "--help").stdout


@pytest.mark.slow
def test_an_unpacked_wheel_runs_the_main_job_without_a_network(offline: Offline) -> None:
    """By one interpreter, since importing torch takes longer than all of the job."""
    calls = (
        ("example", "dog/"),
        ("train", "--images", "dog/", "--token", "[V]", "--steps", "2", "--evaluation-steps", "0"),
        ("sample", "a [V] dog in the snow", "--concept", "runs/dog", "--steps", "2", "--out", "pictures/"),
    )
    program = f"""
from customize.cli import app
for words in {calls}:
    app(words, standalone_mode=False)
"""
    offline.run(sys.executable, "-c", program)
    assert_the_main_job_is_done(offline, pictures=1)


@pytest.mark.slow
def test_an_installed_wheel_runs_the_main_job_without_a_network(wheel: Path, tmp_path: Path) -> None:
    """By its console scripts, in an environment that borrows this one's dependencies but not its Limner."""
    offline = Offline(tmp_path)
    scripts = environment_with(wheel, tmp_path / "environment")
    offline.run(scripts / "customize", "example", "dog/")
    offline.run(scripts / "customize", "train", "--images", "dog/", "--token", "[V]", "--steps", "5")
    prompts = ("a [V] dog in the snow", "a [V] dog under the sea")
    offline.run(scripts / "customize", "sample", *prompts, "--concept", "runs/dog", "--out", "pictures/")
    assert_the_main_job_is_done(offline, pictures=2)


def assert_the_main_job_is_done(offline: Offline, *, pictures: int) -> None:
    assert (offline.folder / "runs" / "dog" / LORA_WEIGHTS).stat().st_size > 0
    for name in [*(f"p{number:02d}-s00.png" for number in range(pictures)), "sheet.png"]:
        with Image.open(offline.folder / "pictures" / name) as picture:
            picture.load()
    assert not offline.attempts.exists(), offline.attempts.read_text()


def environment_with(wheel: Path, folder: Path) -> Path:
    """A new virtual environment with the wheel in it; gives the folder of its scripts.

    It sees this environment's packages through a line in a .pth file, behind its own. An editable Limner
    here stays unseen there: .pth files are not followed from such a line.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    install = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, install)), check=True)
    ask = [scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(list(map(str, ask)), check=True, capture_output=True, text=True).stdout.strip()
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_nothing_is_done_inside_an_assert_which_python_O_leaves_out() -> None:
    changing = {"setdefault", "pop", "popitem", "add", "append", "update", "remove", "read", "write", "send"}
    found = []
    for package in ("backbone", "customize", "edit", "align", "limner", "recipes", "benchmarks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            asserts = [one for one in ast.walk(ast.parse(file.read_text())) if isinstance(one, ast.Assert)]
            for part in (part for one in asserts for part in ast.walk(one.test)):
                function = part.func if isinstance(part, ast.Call) else None
                changes = isinstance(function, ast.Attribute) and function.attr in changing
                if changes or isinstance(part, ast.NamedExpr):
                    found.append(f"{file.relative_to(ROOT)}: {ast.unparse(part)}")
    assert not found
