"""`python -m gvpo …`, which is how launchers start it: `torchrun --nproc-per-node 2 -m gvpo train …`."""

from gvpo.cli import main

main()
