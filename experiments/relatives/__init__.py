"""GVPO beside its relatives (docs/relatives.md): `losses.py` has their formulas."""
