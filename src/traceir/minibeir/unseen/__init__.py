"""Miniatures of the 13 zero-shot columns, in the published file formats; the queries are of kinds that training never saw."""
