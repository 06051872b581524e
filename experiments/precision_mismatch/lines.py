"""Records in a file that grows."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Lines:
    """Records in a file, one a line; every one is on disk when `add` returns."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: list[Record] = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []

    def add(self, record: Record) -> None:
        self.records.append(record)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
