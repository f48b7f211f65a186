"""``fedkn bench gpu``: how fast clients train on a GPU, and whether they do it rightly."""
