"""What packs are made from: folders, tar shards, parquet files, an .npz, and lists of files with their classes."""
