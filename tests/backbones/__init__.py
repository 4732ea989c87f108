"""Every backbone of KerasHub, tiny, and what must hold for each of them.

The arguments are written from the constructors' signatures. `row` says what a
table holds, `texts`, `images` and `several` are the tables, `invariants` is
what holds for all, and `page` writes `docs/backbones.md`.
"""
