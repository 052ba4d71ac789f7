"""The 13 zero-shot columns: readers of the published files, their protocols, and scores (docs/unseen.md)."""
