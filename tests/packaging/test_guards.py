"""Rules about the source that no unit test of behaviour would notice being broken.

Each rule is a function from source text to findings, so that it is shown here to find what it is meant to find.
"""

import ast
import json
import re
import resource
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("core", "modalities", "configs", "data", "src/polydiff", "examples")
MATHS = (
    *("schedules", "schedule", "discrete", "grids", "noise", "denoiser", "objectives", "variational", "sampling"),
    *("likelihood", "guidance", "inverse", "processes", "solvers", "rotations", "rotation_schedules"),
)
MOST_MATHS = 4000  # lines of code: a third of these files is what docstrings say of equations, shapes and sources

BLANK = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

VOCABULARY = re.compile(r"(image|pixel|audio|wave|mel|atom|residue|protein|cloud|mesh)(s|es)?", re.IGNORECASE)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

MODALITY_LIBRARIES = ("torchaudio", "biotite", "trimesh", "e3nn", "h5py")
CONFIG_LIBRARIES = ("hydra", "omegaconf")
HEAVY_LIBRARIES = ("scipy", "sklearn", "skimage", "matplotlib", "plotly", "accelerate", "tensorboard")
FOLDERS = ("core", "modalities", "configs", "data")

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "os.system"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
}

TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
LIKE_DRAWS = {"rand_like", "randn_like", "randint_like"}
METHOD_DRAWS = {
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
    *("multinomial", "bernoulli"),
}
SEEDED = {
    "numpy.random": {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "RandomState"},
    "random": {"Random"},
}

KEEPING = {"get_state", "set_state", "getstate", "setstate", "seed"}  # a checkpoint keeps the shared streams too

Findings = Iterator[tuple[int, str]]


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute; "?" stands for any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Absolute dotted names of everything imported, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imports_of(prefixes: Iterable[str]) -> Callable[[ast.AST], Findings]:
    """Findings: imports of these packages or of anything inside them."""
    inside = tuple(f"{prefix}." for prefix in prefixes)

    def rule(tree: ast.AST) -> Findings:
        return ((line, f"imports {name}") for line, name in imports(tree) if f"{name}.".startswith(inside))

    return rule


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the full name of what is called; "?" stands for an object that was not imported.

    ``from torch import randn as f`` is followed, so that ``f(3)`` is a call of torch.randn.
    """
    origin = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                origin[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            origin.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = dotted(node.func).partition(".")
            yield node, origin.get(first, "?" if dot else first) + dot + rest


def speaks_of_modalities(tree: ast.AST) -> Findings:
    """Identifiers with a word of one modality; ``meshgrid`` and ``torchaudio`` are other words."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.alias(name=original, asname=other):
                name = other or original
            case _:
                continue
        if any(VOCABULARY.fullmatch(word) for word in WORDS.findall(name)):
            yield getattr(node, "lineno", 0), f"identifier {name}"


def names_a_modality(tree: ast.AST) -> Findings:
    """Text constants that are the name of a modality's folder: the core would treat one unlike the others."""
    known = {path.name for path in (ROOT / "modalities").glob("[a-z]*/")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in known:
            yield node.lineno, f"names the modality {node.value!r}"


def is_unsafe(tree: ast.AST) -> Findings:
    """Ways to run what a file says: unpickling, evaluation, unfiltered archives, full YAML."""
    yield from ((n, f"imports {name}") for n, name in imports(tree) if UNSAFE_MODULES.intersection(name.split(".")))
    for node, name in calls(tree):
        if name in UNSAFE_CALLS or name.endswith((".extractall", ".read_pickle", ".unpack_archive")):
            yield node.lineno, f"calls {name}"
        for word in node.keywords:
            if word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False):
                yield node.lineno, "passes allow_pickle"


def draws_globally(tree: ast.AST) -> Findings:
    """Random draws from a shared stream. Initial weights (``nn.init``) are exempt: building a network seeds them."""
    for node, name in calls(tree):
        owner, _, last = name.rpartition(".")
        if owner == "torch.nn.init" or any(word.arg == "generator" for word in node.keywords):
            continue
        if owner in {"torch", "torch.Tensor"} and last in TORCH_DRAWS | LIKE_DRAWS:
            yield node.lineno, f"{name} without generator="
        elif owner.startswith("?") and last in METHOD_DRAWS:
            yield node.lineno, f".{last} without generator="
        elif owner in SEEDED and last not in KEEPING and not (last in SEEDED[owner] and node.args):
            yield node.lineno, f"{name} draws from a shared or unseeded stream"


def files(*places: str) -> list[Path]:
    """Python files in these folders of the repository, prepared data left out; links are not followed."""
    found = {path for place in places for path in (ROOT / place).rglob("*.py")}
    return sorted(path for path in found if "cache" not in path.relative_to(ROOT).parts)


def maths() -> list[Path]:
    """The modules of the core that are its maths, which stay under ``MOST_MATHS`` lines of code together."""
    return [path for path in files("core") if Path(path.relative_to(ROOT).parts[1]).stem in MATHS]


def physical_lines(path: Path) -> int:
    """Lines of a file as ``wc -l`` counts them."""
    return path.read_text(encoding="utf-8").count("\n")


def code_lines(path: Path) -> int:
    """Lines that hold a token of code: not blank, no comment, no docstring."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in BLANK]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(parse(path)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            code -= {*range(text.lineno, (text.end_lineno or text.lineno) + 1)}
    return len(code)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def broken(rule: Callable[[ast.AST], Findings], paths: Iterable[Path]) -> list[str]:
    """``file:line: finding`` for everything the rule finds."""
    return [f"{path.relative_to(ROOT)}:{line}: {text}" for path in paths for line, text in rule(parse(path))]


PLANTED = [
    (speaks_of_modalities, "def decode(pixel_values): ...", "torch.meshgrid(x)"),
    (speaks_of_modalities, "self.MelBank()", "smelt = 1"),
    (speaks_of_modalities, "f(num_atoms=3)", "f(anatomy=3)"),
    (speaks_of_modalities, "from a import b as wave", "import torchaudio"),
    (names_a_modality, "if adapter.name == 'image': ...", "media = 'image/png'"),
    (is_unsafe, "import pickle", "network.eval()"),
    (is_unsafe, "import torch as t\nt.load(f)", "safetensors.torch.load_file(f)\ncheckpoint.load(f)"),
    (is_unsafe, "from yaml import load\nload(text)", "yaml.safe_load(text)\njson.load(f)"),
    (is_unsafe, "archive.extractall(d)", "archive.extractfile(member)"),
    (is_unsafe, "import os\nos.system('ls')", "system('digits')"),
    (is_unsafe, "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=False)"),
    (is_unsafe, "eval('1')", "self.executor(exec_time)"),
    (draws_globally, "import torch\ntorch.randn(3)", "import torch\ntorch.randn(3, generator=g)"),
    (draws_globally, "from torch import randn\nrandn(3)", "noise.randn(3)"),
    (draws_globally, "import torch\nz = torch.randn_like(x)", "noise.draw(k, 'step', x)"),
    (draws_globally, "x.normal_()", "from torch import nn\nx.normal_(generator=g)\nnn.init.normal_(weight)"),
    (draws_globally, "import numpy as np\nnp.random.rand(3)", "import numpy as np\nnp.random.default_rng(0).normal()"),
    (draws_globally, "import numpy as np\nnp.random.default_rng()", "import numpy as np\nnp.random.default_rng(seed)"),
    (draws_globally, "import random\nrandom.shuffle(x)", "import random\nr = random.Random(0)\nr.shuffle(x)"),
    (imports_of(FOLDERS), "from core.errors import ConfigError", "from polydiff.core.errors import ConfigError"),
    (imports_of(FOLDERS), "def f():\n    import modalities.image", "import coreutils\nfrom data_x import y"),
    (imports_of(["h5py"]), "def f():\n    import h5py", "import h5pyd"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), PLANTED)
def test_a_rule_finds_the_planted_fault_and_only_that(rule: Callable[[ast.AST], Findings], bad: str, good: str) -> None:
    assert list(rule(ast.parse(bad)))
    assert not list(rule(ast.parse(good)))


def test_core_does_not_speak_of_modalities() -> None:
    paths = files("core")
    assert len(paths) > 20
    assert broken(speaks_of_modalities, paths) == []
    assert broken(names_a_modality, paths) == []
    stems = [path.relative_to(ROOT) for path in paths if any(map(VOCABULARY.fullmatch, WORDS.findall(path.stem)))]
    assert stems == []


def test_core_imports_no_modality_and_keeps_each_library_in_its_place() -> None:
    core, adapter, runtime = files("core"), ROOT / "core/adapter.py", ROOT / "core/training/runtime.py"
    assert broken(imports_of(MODALITY_LIBRARIES), core) == []
    assert broken(imports_of(["polydiff.modalities"]), set(core) - {adapter}) == []
    assert broken(imports_of(["accelerate"]), set(core) - {runtime}) == []
    command_line = {ROOT / "core/build.py", ROOT / "core/cli.py", *files("core/commands")}
    assert broken(imports_of(CONFIG_LIBRARIES), set(core) - command_line) == []


def test_everything_is_imported_as_polydiff() -> None:
    assert broken(imports_of(FOLDERS), files(*CODE, "tests")) == []


def test_nothing_runs_what_a_file_says() -> None:
    assert broken(is_unsafe, files(*CODE)) == []


def test_every_draw_names_its_stream() -> None:
    assert broken(draws_globally, files("core", "modalities", "data")) == []


def test_modules_stay_readable() -> None:
    lengths = {path.relative_to(ROOT): physical_lines(path) for path in files(*CODE)}
    assert {path: n for path, n in lengths.items() if n > 400} == {}
    assert {path: n for path, n in lengths.items() if path.parts[0] == "examples" and n > 40} == {}
    size = {path.relative_to(ROOT).as_posix(): code_lines(path) for path in maths()}
    assert {Path(path.removeprefix("core/")).parts[0].removesuffix(".py") for path in size} == {*MATHS}
    assert sum(size.values()) < MOST_MATHS, sorted(size.items(), key=lambda entry: -entry[1])


def test_links_for_tools_are_relative() -> None:
    links = {path.name: path.readlink() for path in (ROOT / "src/polydiff").iterdir() if path.is_symlink()}
    assert links == {name: Path("../..", name) for name in FOLDERS}


IMPORT_EACH = """
import importlib, json, sys
new = {}
for name in json.loads(sys.argv[1]):
    before = set(sys.modules)
    importlib.import_module(name)
    new[name] = sorted(set(sys.modules) - before)
print(json.dumps(new))
"""


def test_importing_core_loads_no_modality_and_nothing_heavy() -> None:
    names = [".".join(("polydiff", *path.relative_to(ROOT).with_suffix("").parts)) for path in files("core")]
    names = sorted(
        (name.removesuffix(".__init__") for name in names), key=lambda name: name.endswith((".cli", ".build"))
    )
    command = [sys.executable, "-c", IMPORT_EACH, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded: dict[str, list[str]] = json.loads(result.stdout.splitlines()[-1])
    banned = (*MODALITY_LIBRARIES, *HEAVY_LIBRARIES, "polydiff.modalities")
    for name, new in loaded.items():
        tops = {".".join(module.split(".")[: 2 if module.startswith("polydiff.") else 1]) for module in new}
        allowed = CONFIG_LIBRARIES if name.endswith((".cli", ".build")) else ()
        assert tops.isdisjoint({*banned, *CONFIG_LIBRARIES} - {*allowed}), name


def cpu_seconds(*arguments: str) -> float:
    """Processor time of one Python process: on a busy machine it says more than the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def torch_seconds() -> float:
    """What importing torch alone takes."""
    return min(cpu_seconds("-c", "import torch") for _ in range(3))


@pytest.mark.parametrize("arguments", [("-c", "import polydiff"), ("-m", "polydiff", "--help")], ids=["import", "help"])
def test_starting_costs_less_than_a_second_more_than_torch(arguments: tuple[str, ...], torch_seconds: float) -> None:
    extra = (cpu_seconds(*arguments) - torch_seconds for _ in range(5))
    best = next((seconds for seconds in extra if seconds < 1), None)
    assert best is not None, f"five runs each took over a second more than torch's {torch_seconds:.2f} s"


def test_no_folder_of_tests_is_left_out(request: pytest.FixtureRequest) -> None:
    patterns = request.config.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert Path("tests/build") in folders
    names = {part for folder in folders for part in folder.parts}
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)] == []
