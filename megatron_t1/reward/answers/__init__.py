"""An answer's way: `extract` finds it (`choices` a letter), `normalize` spells it, `read` makes one of the `kinds` of
it, `equal` compares two: structures itself, what has none in `values`, expressions in `compare_trees`."""
