"""A collection of files as items of an index: what lies in folders is found, read, encoded, kept, and kept in step."""
