"""`python -m benchmarks.table FILE... [NAME...]`: kept results as a Markdown table; all rows or those named."""

import json
import sys
from pathlib import Path


def table(arguments: list[str]) -> str:
    files = [argument for argument in arguments if argument.endswith(".json")]
    names = tuple(argument for argument in arguments if not argument.endswith(".json"))
    rows = [row for file in files for row in json.loads(Path(file).read_text())]
    lines = ["| measure | ours | against | times better | unit | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        if names and row["name"] not in names:
            continue
        numbers = ("" if row[key] is None else f"{row[key]:,.4g}" for key in ("ours", "baseline", "ratio"))
        lines.append(f"| {row['name']} | {' | '.join(numbers)} | {row['unit']} | {row['note']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
