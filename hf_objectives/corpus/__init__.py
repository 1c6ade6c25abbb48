"""The corpus engine: files or datasets in, checked shards of packed rows out, on all cores or machines."""
