"""Published tables, run again by one command: each is data (tables/*.toml), each row a run."""
