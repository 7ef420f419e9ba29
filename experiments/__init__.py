"""The laboratory: what GVPO does, where it wins and where it doesn't, on problems small enough to be sure.

Evidence, not library: it is not in the wheel, and `gvpo lab` needs the repository.
`gvpo lab optimum|offline|foreign|frontier|reuse|all` runs it; docs/evidence.md says what came out. The first
three problems of `exact.py` can be enumerated, so that expectations, divergences and π* itself are computed,
not estimated. Opponents are TRL's own losses where TRL has them (`opponents.py`). `gvpo lab language` is
apart: a real language model and TRL's trainers themselves.
"""
