"""An answer's way: `extract` finds it, `normalize` spells it, `read` makes typed values of it, `equal` compares two."""
