"""From text files to batches: sources -> token shards -> lanes of packed rows."""
