"""Nothing that is read from disk or network is run: no pickles, no eval, no unsafe loaders, by the syntax tree."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ppo_jax"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "pandas"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("yaml", "load"), ("yaml", "load_all"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "Loader"),
    ("yaml", "UnsafeLoader"), ("yaml", "FullLoader"), ("torch", "load"), ("np", "fromregex"), ("os", "system"),
}  # fmt: skip


def violations(source: str) -> list[str]:
    """One line for each way in which `source` would run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"imports {name}" for name in names if name.split(".")[0] in MODULES]
        found += [f"imports {name}" for name in names if tuple(name.split(".")[-2:]) in ATTRIBUTES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(f"calls {node.func.id}")
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and ((node.value.id, node.attr) in ATTRIBUTES)
        ):
            found.append(f"uses {node.value.id}.{node.attr}")
        if isinstance(node, ast.keyword):
            constant = node.value.value if isinstance(node.value, ast.Constant) else None
            if node.arg in ("allow_pickle", "trust_remote_code", "shell") and constant is not False:
                found.append(f"passes {node.arg}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    import dill as d",
        "from joblib import load",
        "import torch",
        "eval(text)",
        "exec(open(name).read())",
        "yaml.load(text)",
        "from yaml import unsafe_load",
        "yaml.compose(text, Loader=yaml.UnsafeLoader)",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=flag)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_of_them_is_found(source: str) -> None:
    assert violations(source)


def test_what_is_allowed() -> None:
    assert not violations("import re\nre.compile('a')\nyaml.safe_load(t)\nnp.load(f, allow_pickle=False)\nmodel.eval()")
