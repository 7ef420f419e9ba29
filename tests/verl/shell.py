"""What the shell makes of a script."""

import os
import subprocess
from pathlib import Path


def arguments(script: str, folder: Path) -> list[str]:
    """What the script calls Python with, according to the shell."""
    stub = folder / "python3"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n')
    stub.chmod(0o755)
    out = folder / "arguments.txt"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "ARGUMENTS": str(out)}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    return out.read_text().splitlines()
