"""Every option of the installed `GRPOConfig` is taken, refused or explained, and the page says so."""

import dataclasses

import trl
from trl import GRPOConfig

from benchmarks.options import EXPLAINED, PAGE, SAME, rewritten, unexplained
from gvpo.trl.config import REFUSED, GVPOConfig


def test_every_option_of_trl_is_taken_refused_or_explained():
    assert unexplained() == [], "take it, refuse it in gvpo.trl.config, or explain it in benchmarks.options"
    taken = [name for names in EXPLAINED for name in names.split()] + SAME
    assert sorted(set(taken)) == sorted(taken), "said twice"
    assert not REFUSED.keys() & {*taken}
    defaults = {name: getattr(GRPOConfig, name) for name in taken if name != "beta"}
    assert {name: getattr(GVPOConfig, name) for name in defaults} == defaults


def test_an_option_that_trl_adds_is_found():
    newer = dataclasses.make_dataclass("Newer", [("brand_new", int, 0)], bases=(GRPOConfig,))
    assert unexplained(newer) == ["brand_new"]


def test_the_page_has_the_table_of_the_tested_trl():
    if not trl.__version__.startswith("1.16."):
        return
    page = PAGE.read_text(encoding="utf-8")
    assert rewritten(page) == page, "python -m benchmarks.options --write"
