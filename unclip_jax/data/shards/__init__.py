"""Data sets in shards: tar and parquet files, here or in a bucket."""
