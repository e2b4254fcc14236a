"""Data sets in shards: tar files of the WebDataset format, and one index of all that is in them.

`index` opens a data set, `members` reads a clip, `tars` looks through tar files of others, `writing` writes them.
"""
