"""The list of srpo's programs, one line each: `python -m srpo`.

A line is the first sentence of a program's docstring, read from its source: importing a program would take seconds.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def summaries() -> dict[str, str]:
    """{module: first sentence of its docstring without the command} of every file of srpo/ that calls `run_program`."""
    lines = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
        if "run_program" in calls:
            sentence = (ast.get_docstring(tree) or "").partition("\n")[0]
            lines[f"srpo.{path.stem}"] = sentence.partition(": `")[0]
    return lines


def main(arguments: list[str]) -> int:
    """Print the list and return the exit status: 2 if a program or flag was given, because this command runs none."""
    if arguments and arguments not in (["-h"], ["--help"]):
        print("error: `python -m srpo` only lists the programs: run one as `python -m srpo.train ...`", file=sys.stderr)
        return 2
    programs = summaries()
    width = max(map(len, programs))
    print("Programs of srpo. `python -m PROGRAM -h` lists the flags of one.\n")
    print("\n".join(f"  {name:{width}}  {sentence}" for name, sentence in programs.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
