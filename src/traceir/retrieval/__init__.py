"""From a query to a page of hits: vectors and words, cut-off, near-duplicates folded, reranking, cursors."""
