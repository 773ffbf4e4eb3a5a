"""Reading and writing the files of tokenizers, with one kind of error."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError


def read_bytes(path: Path) -> bytes:
    """Return the content of a file; raises InputError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises InputError where there is none."""
    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files, and give them their names only when all are on disk."""
    temporaries = {name: folder / f".{name}.{uuid.uuid4().hex}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, temporary in temporaries.items():
            with open(temporary, "xb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    except OSError as error:
        raise InputError(f"{folder}: the tokenizer cannot be written: {error.strerror}") from error
    finally:
        for temporary in temporaries.values():
            if temporary.exists():
                temporary.unlink()


def to_json(config: Mapping[str, Any]) -> bytes:
    """Write an object as a person would like to read it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
