"""Run in a process of its own by the contract tests: import an adapter, then read the files that another process wrote.

Takes a task as JSON on standard input, answers with one line of JSON and a file of tensors.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from safetensors.torch import save_file

from polydiff.core import adapter as adapters


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Import the adapter's module, read each file through the codec, and store the encoded states."""
    before = set(sys.modules)
    importlib.import_module(task["module"])
    imported = sorted(set(sys.modules) - before)
    codec = adapters.load(task["name"]).codec(task["facts"])
    states, errors = {}, {}
    for kind, paths in task["files"].items():
        for i, path in enumerate(paths):
            try:
                state = codec.encode(codec.read(path))
            except Exception as error:  # noqa: BLE001  whatever it is, the test says which file and why
                errors[kind] = f"{type(error).__name__}: {error}"
                break
            leaves = state if isinstance(state, dict) else {"": state}
            states.update({f"{kind}/{i}/{name}": leaf.contiguous() for name, leaf in leaves.items()})
    save_file(states, task["out"])
    return {"imported": imported, "errors": errors}


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
