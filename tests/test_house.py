"""The rules of the house: imports go one way, flags stay at the door, and README lists the rooms that there are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT, run_python

CODE = ROOT / "EqM"
# The floors of the house, the lowest first. A module may import its own room, and rooms on lower floors.
# What stands on no floor is a command: nothing imports it.
FLOORS = (
    {"runtime", "energy", "clip_field", "paths", "positions"},
    {"layers"},
    {"drawing", "models", "objective", "precision"},
    {"network_settings", "compiled", "data"},
    {"graphs", "sharding", "optimizer"},
    {"muon"},
    {"state"},
    {"runs", "step", "evaluation"},
    {"sampling"},
    {"measuring"},
)
COMMANDS = len(FLOORS)
# Functions that read flags, outside commands.
READS_FLAGS = re.compile(r"add_\w+_args?|\w+_of|check_\w+")
PRIVATE_TORCH = re.compile(
    r"torch\._[a-z]|_foreach_|_fused_adamw|\bfound_inf\b|_per_optimizer_states|graphsafe_|_compiled_call_impl|_call_impl"
)


def modules(folder: Path) -> dict[str, Path]:
    """The modules of a folder, by their dotted names."""
    paths = {path: path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py")}
    return {".".join(parts): path for path, parts in paths.items() if parts[-1] != "__init__"}


def imports(path: Path, known: set[str]) -> set[str]:
    """The known modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found & known


def floor_of(module: str) -> int:
    room = module.split(".")[0]
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), COMMANDS)


def breaches(folder: Path) -> Iterator[str]:
    """Imports that do not go down, and cycles, in words."""
    paths = modules(folder)
    graph = {name: imports(path, paths.keys()) for name, path in paths.items()}
    for name, imported in graph.items():
        for other in sorted(imported):
            same_room = name.split(".")[0] == other.split(".")[0]
            if floor_of(other) == COMMANDS or (not same_room and floor_of(other) >= floor_of(name)):
                yield f"{name} imports {other}"
    waiting = dict(graph)
    while ready := [name for name, imported in waiting.items() if not imported & waiting.keys()]:
        for name in ready:
            del waiting[name]
    if waiting:
        yield f"a cycle among {', '.join(sorted(waiting))}"


def test_imports_go_one_way():
    assert list(breaches(CODE)) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"runtime/files.py": "def f():\n    from data.scan import scan", "data/scan.py": ""}, "runtime.files imports"),
        ({"data/scan.py": "from check_data import main", "check_data.py": ""}, "data.scan imports check_data"),
        ({"runs/a.py": "import step", "step.py": ""}, "runs.a imports step"),
        ({"data/a.py": "from data import b", "data/b.py": "import data.a"}, "a cycle among data.a, data.b"),
    ],
)
def test_an_import_upward_and_a_cycle_are_found(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(breach.startswith(said) for breach in breaches(tmp_path))


def flag_readers(path: Path) -> Iterator[str]:
    """Functions of a room that take flags, and lines that name Namespace outside those that may."""
    tree = ast.parse(path.read_text())
    allowed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if READS_FLAGS.fullmatch(node.name):
                allowed |= set(range(node.lineno, node.end_lineno + 1))
            elif any(argument.arg == "args" for argument in ast.walk(node.args) if isinstance(argument, ast.arg)):
                yield f"{path.name}: {node.name} takes args"
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if "Namespace" in line and number not in allowed:
            yield f"{path.name}: {line.strip()}"


def test_flags_stay_at_the_door():
    rooms = [path for name, path in modules(CODE).items() if floor_of(name) < COMMANDS]
    found = [breach for path in rooms for breach in flag_readers(path)]
    # A published checkpoint holds flags, so that loading must allow their type.
    assert found == [
        "checkpoint.py: with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():"
    ]


def test_no_test_makes_flags_of_its_own():
    forged = re.compile(r"\bNamespace\(")
    found = [
        path.name
        for path in (ROOT / "tests").glob("*.py")
        for line in path.read_text().splitlines()
        if forged.search(re.sub(r"SimpleNamespace\(", "", line)) and "forged" not in line
    ]
    assert found == ["test_models.py"], "a published checkpoint's own Namespace is the only one"


def test_private_parts_of_torch_stand_in_one_file():
    found = {path.name for path in modules(CODE).values() if PRIVATE_TORCH.search(path.read_text())}
    assert found == {"compiled.py"}


def test_readme_lists_the_rooms_that_there_are():
    lines = (ROOT / "README.md").read_text().split("\nEqM/\n")[1].split("\ndatasets/")[0].splitlines()
    listed = {name for line in lines for name in re.split(r"  +", line.strip())[0].replace("/", "").split()}
    rooms = {path.name for path in CODE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == rooms | {path.name for path in CODE.glob("*.py")}
    # The order of the list is the order of the floors.
    floors = [floor_of(name.removesuffix(".py")) for name in (line.split()[0].strip("/") for line in lines)]
    assert floors == sorted(floors)


def test_every_room_says_what_it_is_for():
    for folder in (path.parent for path in CODE.rglob("*/*.py")):
        assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "") > 20, folder


def test_files_and_functions_stay_short():
    sources = {path: path.read_text() for path in [*CODE.rglob("*.py"), *(ROOT / "datasets").glob("*.py")]}
    assert [path.name for path, text in sources.items() if len(text.splitlines()) > 300] == []
    functions = (node for text in sources.values() for node in ast.walk(ast.parse(text)))
    functions = (node for node in functions if isinstance(node, ast.FunctionDef))
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 70] == []


def test_help_imports_only_what_flags_need(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(CODE)!r}); sys.argv = ['train.py', '--help']\n"
        "import atexit, runpy\n"
        "heavy = ('torchvision', 'timm', 'diffusers', 'torch._dynamo', 'tensorboard', 'wandb', 'matplotlib')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        f"runpy.run_path({str(CODE / 'train.py')!r}, run_name='__main__')\n"
    )
    (tmp_path / "help.py").write_text(program)
    result = run_python(tmp_path / "help.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
