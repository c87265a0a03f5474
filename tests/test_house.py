"""The rules of the house as tests: sizes, allowed imports, annotations, docstrings, and forbidden code."""

from __future__ import annotations

import ast
import re
import statistics
from collections import Counter

import pytest
from house_sources import (
    PACKAGE,
    ROOT,
    Source,
    cycles,
    fail_with,
    imports_of,
    in_files,
    is_mutable,
    length,
    package,
    programs,
    public,
    room_of,
    sources,
    standard_library,
    tracked,
    written_to,
)

FILE_LINES, FILE_MEDIAN = 500, 200
FUNCTION_LINES, FUNCTION_P90 = 80, 40
README_LINES = 180

# What a room may import: rooms or single files of ours, then libraries beside the standard one. All rooms may
# import those in OPEN. "data" stands for all of its rooms.
DATA = {"data", "data/text", "data/store", "data/tokenize", "data/order", "data/stream"}
ENGINES = {"engines", "engines/base", "engines/saved"}
HOST_ROOM = {*ENGINES, *DATA, "model", "routers", "ops", "checkpoint", "config", "compat"}
LATE_ROOM = {
    "config",
    "model",
    "routers",
    "ops",
    "checkpoint",
    "train.metrics",
    "train.hooks",
    *DATA,
    *ENGINES,
}
COMMAND = {
    *LATE_ROOM,
    "train",
    "guard",
    "evaluate",
    "analysis",
    "compat",
    "engines/megatron",
    "engines/deepspeed",
}
MODEL_TOOLS = {"export", "export/classes", "proof", "importing", "generation", "huggingface", "finetuning"}
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "console": (set(), {"rich"}),
    "flags": (set(), set()),
    "terminal": (set(), {"rich"}),
    "files": (set(), set()),
    "paths": (set(), set()),
    "processes": (set(), set()),
    "config": (set(), {"annotated_types", "pydantic", "yaml"}),
    "ops": (set(), {"torch"}),
    "routers": ({"ops", "config.kinds", "config.roles"}, {"torch", "annotated_types", "pydantic"}),
    "data": (set(), set()),
    "data/text": (set(), {"pyarrow", "zstandard"}),
    "data/store": ({"data/text"}, {"numpy"}),
    "data/tokenize": (
        {"config", "data/text", "data/store"},
        {"numpy", "tokenizers", "gigatoken", "huggingface_hub", "sentencepiece", "tiktoken"},
    ),
    "data/order": ({"config", "data", "data/store"}, {"numpy"}),
    "data/stream": ({"config", "data/store", "data/order"}, {"numpy", "torch"}),
    "model": ({"config", "compat.rotary", "compat.specs"}, {"torch", "megatron"}),
    "compat": (set(), {"torch", "deepspeed", "megatron"}),
    "checkpoint": ({"config"}, {"torch", "safetensors"}),
    "engines/base": ({"config"}, {"torch"}),
    "engines": (HOST_ROOM, {"torch", "numpy"}),  # what both hosts share: nothing of either
    "engines/saved": (HOST_ROOM, {"torch", "numpy"}),
    "engines/deepspeed": (HOST_ROOM, {"torch", "deepspeed", "megatron", "numpy"}),
    "engines/megatron": (HOST_ROOM, {"torch", "megatron", "numpy"}),
    "guard": ({"engines/base", "config"}, {"torch"}),
    "watch": ({"guard"}, set()),
    "doctor": ({"compat", "guard"}, {"torch"}),
    "train": (
        {
            "engines/base",
            *DATA,
            "config",
            "checkpoint.folder",
            "checkpoint.description",
            "checkpoint.writer",
            "guard",
        },
        {"torch", "numpy", "rich", "tensorboard", "wandb"},
    ),
    "evaluate": ({*LATE_ROOM, "analysis"}, {"torch", "numpy"}),
    "finetuning": (
        {*LATE_ROOM, "train.lr", "train.resuming.run_meta", "evaluate", "analysis"},
        {"torch", "numpy", "megatron"},
    ),
    "export": ({*LATE_ROOM, "export/classes"}, {"torch", "numpy", "safetensors", "megatron"}),
    "export/classes": ({"config", "model"}, {"torch"}),
    "huggingface": (
        set(),
        {"torch", "numpy", "transformers", "safetensors", "lm_eval", "gguf"},
    ),  # runs in other environments, too
    "proof": (
        {*LATE_ROOM, "evaluate", "export", "export/classes", "importing"},
        {"torch", "numpy", "safetensors"},
    ),
    "importing": ({*LATE_ROOM, "export", "export/classes", "analysis"}, {"torch", "yaml"}),
    "generation": ({*LATE_ROOM, "evaluate", "export", "export/classes", "importing"}, {"torch"}),
    "analysis": (LATE_ROOM, {"torch", "numpy"}),
    "verify": ({*COMMAND, "verify"}, {"torch", "numpy", "deepspeed"}),
    "planning": (
        {*LATE_ROOM, "analysis", "engines/deepspeed", "engines/megatron", "compat"},
        {"torch", "numpy", "deepspeed", "megatron"},
    ),
    "studies": ({*COMMAND, "studies", "verify", "planning"}, {"torch", "numpy", "matplotlib"}),
    "report": (
        {
            "analysis",
            "config.reading.yaml_text",
            "guard.events",
            "studies.verdicts",
            "studies.router_tables",
            "studies.tables",
        },
        {"matplotlib", "yaml"},
    ),
    "commands": ({"compat"}, set()),
    "commands/training": ({*COMMAND, "planning"}, {"torch"}),
    "commands/cluster": ({*COMMAND, "doctor", "watch", "planning"}, set()),
    "commands/data": (COMMAND, {"torch", "numpy"}),
    "commands/models": ({*COMMAND, *MODEL_TOOLS}, {"torch", "numpy", "rich"}),
    "commands/studies": ({*COMMAND, "studies", "verify", "report"}, {"torch", "numpy", "rich"}),
    # the package's own __init__, which hands out names, and __main__
    "": ({"routers", "engines", "engines/deepspeed", "engines/megatron", "commands"}, set()),
}
OPEN = {"errors", "console", "flags", "terminal", "files", "paths", "processes"}
ROOM_LIMITS = {"tools": 30}  # wrappers of 8 lines, one for each command

# Names that hold what a file registers or a process has found out, filled once and only read afterwards.
REGISTRIES = {"megatron_hyperrouter/routers/base.py": {"ROUTERS"}}


def wrappers() -> dict[str, Source]:
    """The files that start a command of a checkout."""
    outside = ("tools/", "pretrain_gpt_hyperrouter.py")
    return {source.name: source for source in sources() if source.name.startswith(outside)}


class TestSizes:
    def test_files(self):
        sizes = {source.name: source.text.count("\n") for source in sources()}
        fail_with(
            f"files over {FILE_LINES} lines",
            [f"{name}: {size}" for name, size in sizes.items() if size > FILE_LINES],
        )
        median = statistics.median(source.text.count("\n") for source in programs())
        assert median <= FILE_MEDIAN

    def test_functions(self):
        sizes = {
            f"{source.name}:{node.lineno} {node.name}": length(node)
            for source in sources()
            for node in source.functions()
        }
        fail_with(
            f"functions over {FUNCTION_LINES} lines",
            [f"{name}: {size}" for name, size in sizes.items() if size > FUNCTION_LINES],
        )

    def test_most_functions_are_short(self):
        sizes = sorted(length(node) for source in programs() for node in source.functions())
        assert sizes[int(0.9 * len(sizes))] <= FUNCTION_P90

    def test_rooms_are_small(self):
        rooms = Counter(source.path.parent.relative_to(ROOT).as_posix() for source in programs())
        rooms = {room: count for room, count in rooms.items() if "__init__" not in room}
        full = [
            f"{room}: {count} files" for room, count in rooms.items() if count > ROOM_LIMITS.get(room, 12)
        ]
        fail_with("rooms with more than 12 Python files", full)

    def test_tools_are_wrappers(self):
        tools = [
            s for s in sources() if s.name.startswith("tools/") or s.name == "pretrain_gpt_hyperrouter.py"
        ]
        assert len(tools) > 10
        long = [
            f"{source.name}: {source.text.count(chr(10))}" for source in tools if source.text.count("\n") > 8
        ]
        fail_with("wrappers of more than 8 lines", long)

    def test_readme(self):
        readme = ROOT / "README.md"
        if readme.exists():
            assert len(readme.read_text(encoding="utf-8").splitlines()) <= README_LINES


class TestImports:
    def test_every_room_is_in_the_table(self):
        fail_with(
            "rooms that the table does not know", sorted({source.room for source in package()} - set(ROOMS))
        )

    def test_rooms_import_only_what_the_table_allows(self):
        guilty = []
        for source in package():
            ours, libraries = ROOMS[source.room]
            for found in source.imports():
                top = found.module.split(".")[0]
                if top == PACKAGE:
                    allowed = room_of(found.module) in ours | OPEN | {source.room, ""} or in_files(
                        found.module, ours
                    )
                else:
                    allowed = top in libraries or top in standard_library()
                if not allowed:
                    guilty.append(f"{source.name}:{found.line} imports {found.module}")
        fail_with("imports that the table does not allow", guilty)

    def test_only_the_main_program_tools_and_tests_stand_outside(self):
        guilty = []
        outside = {
            path.name.split(".")[0] for path in ROOT.glob("*") if path.is_dir() or path.suffix == ".py"
        } - {PACKAGE}
        for source in package():
            guilty += [
                f"{source.name}:{found.line} {found.module}"
                for found in source.imports()
                if found.module.split(".")[0] in outside
            ]
        fail_with("the package imports programs, tools or tests", guilty)

    def test_rooms_do_not_import_each_other_both_ways(self):
        arrows = {
            (source.room, room_of(found.module))
            for source in package()
            for found in source.imports()
            if found.module.startswith(f"{PACKAGE}.")
        }
        both = sorted(
            {
                tuple(sorted(pair))
                for pair in arrows
                if pair[0] != pair[1] and pair[::-1] in arrows and "" not in pair
            }
        )
        fail_with("rooms that import each other", [f"{a} <-> {b}" for a, b in both])

    def test_no_import_cycles(self):
        modules = {source.module for source in package()}

        def owner(module: str) -> str | None:
            while module not in modules:
                module, _, rest = module.rpartition(".")
                if not rest:
                    return None
            return module

        graph: dict[str, set[str]] = {module: set() for module in modules}
        for source in package():
            for found in source.imports():
                target = owner(found.module)
                # a package's __init__ gathers its own files, which import its siblings and not it
                if (
                    target
                    and target != source.module
                    and found.at_top
                    and not found.for_types
                    and source.path.name != "__init__.py"
                ):
                    graph[source.module].add(target)
        fail_with("import cycles", cycles(graph))

    def test_fan_out(self):
        guilty = []
        for source in package():
            ours = {
                found.module.rpartition(".")[0]
                for found in source.imports()
                if found.module.startswith(PACKAGE) and not found.for_types
            }
            gathers = source.room.split("/")[0] in ("commands", "studies", "verify")  # they join the rooms
            if len(ours) > (16 if gathers else 8):
                guilty.append(f"{source.name}: {len(ours)}")
        fail_with("files that import too many others", guilty)


class TestWriting:
    def test_everything_is_annotated(self):
        guilty = []
        for source in programs():
            for node in source.functions():
                arguments = [
                    *node.args.posonlyargs,
                    *node.args.args,
                    *node.args.kwonlyargs,
                    node.args.vararg,
                    node.args.kwarg,
                ]
                bare = [
                    each.arg
                    for each in arguments
                    if each and each.annotation is None and each.arg not in ("self", "cls", "ctx", "mcs")
                ]
                if node.returns is None:
                    bare.append("return")
                if bare and source.name != "setup.py":
                    guilty.append(f"{source.name}:{node.lineno} {node.name}: {', '.join(bare)}")
        fail_with("functions that are not annotated", guilty)

    def test_public_names_have_docstrings(self):
        guilty = []
        for source in programs():
            if source.text.strip() and not ast.get_docstring(source.tree):
                guilty.append(f"{source.name}: the file")
            for node, owner in public(source.tree):
                if not ast.get_docstring(node):
                    guilty.append(f"{source.name}:{node.lineno} {owner}{node.name}")
        fail_with("public names without a docstring", guilty)

    def test_annotations_are_postponed(self):
        with_code = [s for s in sources() if len(s.tree.body) > bool(ast.get_docstring(s.tree))]
        guilty = [s.name for s in with_code if "from __future__ import annotations" not in s.text]
        guilty = [name for name in guilty if name != "setup.py" and name not in wrappers()]
        fail_with("files without 'from __future__ import annotations'", guilty)

    def test_nothing_prints_but_console_terminal_and_commands(self):
        guilty = []
        for source in package():
            if source.room in ("console", "terminal") or source.room.startswith("commands"):
                continue
            for node in ast.walk(source.tree):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in ("print", "pprint", "breakpoint")
                ):
                    guilty.append(f"{source.name}:{node.lineno}")
        fail_with("prints in the package", guilty)

    def test_no_bare_except(self):
        nodes = [(source, node) for source in sources() for node in ast.walk(source.tree)]
        guilty = [
            f"{s.name}:{n.lineno}" for s, n in nodes if isinstance(n, ast.ExceptHandler) and n.type is None
        ]
        fail_with("bare except", guilty)

    def test_no_mutable_globals(self):
        guilty = []
        for source in package():
            guilty += [
                f"{source.name}:{node.lineno} global"
                for node in ast.walk(source.tree)
                if isinstance(node, ast.Global)
            ]
            for node in source.tree.body:
                value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
                if value is None or not is_mutable(value):
                    continue
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {target.id for target in targets if isinstance(target, ast.Name)}
                if not names <= REGISTRIES.get(source.name, set()) | {"__all__"} and written_to(
                    source.tree, names
                ):
                    guilty.append(f"{source.name}:{node.lineno} {', '.join(names)}")
        fail_with("globals that change", guilty)


# What makes a tensor from nothing: on the CPU, unless it is given a device.
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "tensor", "tril_indices", "triu_indices", "zeros"}


def without_device(tree: ast.AST) -> list[int]:
    """Lines of calls of ``torch.zeros`` and its kin that give no device."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not {"device", None} & {keyword.arg for keyword in node.keywords}
    ]


class TestContents:
    def test_engines_say_where_a_tensor_is_made(self):
        """A tensor on the CPU that meets one on the GPU ends the run, and no test without a GPU sees it."""
        rooms = [source for source in package() if source.room.startswith("engines")]
        guilty = [f"{s.name}:{line}" for s in rooms for line in without_device(s.tree)]
        fail_with("tensors of the engines without device=", guilty)

    # written so that this file does not hold what it looks for
    FORBIDDEN = (
        r"/wo" + r"rk/",
        r"/ho" + r"me/\w",
        r"/ro" + r"ot\b",
        r"/opt" + r"/\w",
        r"\.\./sha" + r"red",
        r"py" + r"pi\.org",
        r"pythonhos" + r"ted",
        r"download\.py" + r"torch",
        r"index" + r"-url",
    )

    @pytest.mark.parametrize("pattern", FORBIDDEN)
    def test_no_file_names_a_machine(self, pattern):
        guilty = []
        for path in tracked():
            if path.suffix in (".png", ".bin", ".idx", ".gz", ".zst"):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if re.search(pattern, line):
                    guilty.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
        fail_with(f"machine paths or package registries ({pattern})", guilty)

    def test_no_leftovers(self):
        endings = (".pyc", ".so", ".orig", ".rej", ".log", ".pt", ".safetensors")
        fail_with(
            "files that do not belong in the repository",
            [str(p.relative_to(ROOT)) for p in tracked() if p.name.endswith(endings)],
        )

    def test_no_debugger_and_no_pending_notes(self):
        word = r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|pd" + r"b)\b"
        guilty = [
            f"{s.name}:{n}"
            for s in sources()
            for n, line in enumerate(s.text.splitlines(), 1)
            if re.search(word, line)
        ]
        fail_with("pending notes and debuggers", guilty)

    def test_tests_mirror_the_package(self):
        rooms = {source.room.split("/")[0] for source in package()} - {"", *OPEN}
        folders = {
            path.parent.relative_to(ROOT / "tests").as_posix().split("/")[0]
            for path in tracked()
            if path.match("tests/*/test_*.py")
        }
        fail_with(
            "folders of tests without a room",
            sorted(folders - rooms - {"tools", "examples", "benchmarks", "program", "cluster"}),
        )


class TestTheseTests:
    """The checks above see what they are meant to see."""

    def test_rooms(self):
        assert room_of(f"{PACKAGE}.ops.topk.topk_softmax") == "ops"
        assert room_of(f"{PACKAGE}.engines.base.RankPlace") == "engines/base"
        assert room_of(f"{PACKAGE}.engines.deepspeed.engine") == "engines/deepspeed"
        assert room_of(f"{PACKAGE}.engines.open_engine") == "engines"
        assert room_of(PACKAGE) == room_of(f"{PACKAGE}.__version__") == ""
        assert in_files(f"{PACKAGE}.train.hooks.Hook", LATE_ROOM)
        assert not in_files(f"{PACKAGE}.train.loop.train", LATE_ROOM)

    def test_imports_are_found_wherever_they_stand(self):
        text = (
            "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    try:\n        import c\n    except "
            "E:\n        from d import e\n"
        )
        found = [
            (i.module, i.for_types, i.at_top)
            for i in imports_of(ast.parse(text).body, for_types=False, at_top=True)
        ]
        assert found == [("a", False, True), ("b", True, True), ("c", False, False), ("d.e", False, False)]

    def test_cycles(self):
        assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
        assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]

    def test_globals_that_change(self):
        assert written_to(ast.parse("A = {}\ndef f():\n    A[1] = 2\n"), {"A"})
        assert written_to(ast.parse("A = []\ndef f():\n    A.append(2)\n"), {"A"})
        assert not written_to(ast.parse("A = {1: 2}\ndef f():\n    return A[1]\n"), {"A"})

    def test_tensors_without_a_device(self):
        text = "torch.zeros(2)\ntorch.full((1,), 2.0, device=d)\ntorch.ones(2, **k)\ntorch.zeros_like(x)\n"
        assert without_device(ast.parse(text)) == [1]

    def test_handlers_and_with_blocks_count_as_code(self):
        (found,) = imports_of(ast.parse("with x:\n    import a\n").body, for_types=False, at_top=True)
        assert found.at_top
