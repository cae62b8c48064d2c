"""Object stores: `remote` (a folder in one), `lease` (its only writer), `caches` and `runs` (what lies there)."""
